"""`edgebroker promote`: a mirror becomes the origin."""

from __future__ import annotations

import argparse
import json

from edgebroker.cli.admin_client import call


def promote(options: argparse.Namespace) -> int:
    if options.undo:
        call(options.admin, "DELETE", "/v1/promote")
        said = "from its next start on the node follows its configuration"
    else:
        call(options.admin, "POST", "/v1/promote", {"level": options.level})
        said = f"this node writes what it mirrored from now on, at level {options.level}"
    print(json.dumps({"level": None if options.undo else options.level}) if options.json else said)
    return 0
