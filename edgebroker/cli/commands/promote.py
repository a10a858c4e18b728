"""`edgebroker promote`: make a replica the origin of its topics."""

from __future__ import annotations

import argparse
import json

from edgebroker.cli.admin_client import call
from edgebroker.cli.command import Parser, admin_flag, json_flag
from edgebroker.common.levels import LEVELS


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=promote)
    parser.description = (
        "Make a node the origin of the topics that it replicates, when the node that wrote them is lost. Records that "
        "had not reached this node are lost with it."
    )
    parser.add_argument("--level", choices=LEVELS[:-1], default="root", help="level that the node takes (default root)")
    parser.add_argument("--undo", action="store_true", help="follow the configuration again from the next start on")
    admin_flag(parser)
    json_flag(parser)


def promote(options: argparse.Namespace) -> int:
    if options.undo:
        call(options.admin, "DELETE", "/v1/promote")
        text = "promotion removed: the node follows its configuration from its next start on"
    else:
        call(options.admin, "POST", "/v1/promote", {"level": options.level})
        text = f"this node is now the origin of the topics that it replicated, at level {options.level}"
    print(json.dumps({"level": None if options.undo else options.level}) if options.json else text)
    return 0
