"""`edgebroker repair --from HOST:PORT`: fetch damaged records again from a node that has them."""

from __future__ import annotations

import argparse
import json

from edgebroker.cli.admin_client import call


def repair(options: argparse.Namespace) -> int:
    found = call(options.admin, "POST", "/v1/repair", {"from": options.source, "topic": options.topic})
    if options.json:
        print(json.dumps(found))
        return 0
    for name, count in found["repaired"].items():
        print(f"{name}: {count} records are whole again")
    if not found["repaired"]:
        print("nothing is damaged")
    return 0
