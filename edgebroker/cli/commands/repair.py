"""`edgebroker repair`: fetch corrupt ranges from another node."""

from __future__ import annotations

import argparse
import json

from edgebroker.cli.admin_client import call
from edgebroker.cli.command import Parser, admin_flag, json_flag
from edgebroker.cli.render import counted


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=repair)
    parser.description = (
        "Fetch records whose checksum fails from another node that has them, verify them and put them in place. A "
        "replica repairs from its parent by itself; use this at an origin, or to name another source."
    )
    parser.add_argument(
        "--from", dest="source", required=True, metavar="NODE", help="a node of the tree: its name, uid or HOST:PORT"
    )
    parser.add_argument("--topic", default="", help="only this topic (default: all)")
    admin_flag(parser)
    json_flag(parser)


def repair(options: argparse.Namespace) -> int:
    found = call(options.admin, "POST", "/v1/repair", {"from": options.source, "topic": options.topic})
    if options.json:
        print(json.dumps(found))
        return 0
    for name, count in found["repaired"].items():
        print(f"{name}: {counted(count, 'record')} repaired")
    if not found["repaired"]:
        print("no corrupt ranges")
    return 0
