"""`edgebroker pipe`: the parent that a node follows, what it lacks of its logs, and the children that it feeds."""

from __future__ import annotations

import argparse
import json
from typing import Any

from edgebroker.cli.admin_client import call
from edgebroker.cli.render import print_table


def pipe(options: argparse.Namespace) -> int:
    found = call(options.admin, "GET", "/v1/pipe")
    if options.json:
        print(json.dumps(found))
        return 0
    _parent(found["parent"])
    if found["children"]:
        print()
        print_table(
            ("child", "level", "address", "logs", "lag", "bytes_per_second"),
            [
                (one["name"], one["level"], one["address"], one["logs"], one["lag"], one["bytes_per_second"])
                for one in found["children"]
            ],
        )
    else:
        print("no child is connected")
    return 0


def _parent(parent: dict[str, Any] | None) -> None:
    if parent is None:
        print("this node follows no parent (pipe.parents is empty)")
        return
    missing = f"not connected: {parent['error'] or 'not yet'}"
    print(f"parent {parent['address']}: {'connected to ' + parent['name'] if parent['connected'] else missing}")
    print_table(
        ("topic", "partition", "state", "offset", "lag", "why"),
        [
            (line["topic"], line["partition"], line["state"], line["offset"], _number(line["lag"]), line["why"] or "-")
            for line in parent["logs"]
        ],
    )


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
