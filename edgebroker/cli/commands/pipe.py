"""`edgebroker pipe`: replication from the parent of a node and to its children."""

from __future__ import annotations

import argparse
import json
from typing import Any

from edgebroker.cli.admin_client import call
from edgebroker.cli.command import Parser, admin_flag, json_flag
from edgebroker.cli.render import print_table


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=pipe)
    parser.description = (
        "Show the parent that a node replicates from, the lag of each log, and the children that replicate from it."
    )
    admin_flag(parser)
    json_flag(parser)


def pipe(options: argparse.Namespace) -> int:
    found = call(options.admin, "GET", "/v1/pipe")
    if options.json:
        print(json.dumps(found))
        return 0
    _print_parent(found["parent"])
    _print_children(found["children"])
    return 0


def _print_parent(parent: dict[str, Any] | None) -> None:
    if parent is None:
        print("this node has no parent (pipe.parents and pipe.registry are empty)")
        return
    state = f"connected to {parent['name']}" if parent["connected"] else "not connected"
    if not parent["connected"] and parent["error"]:
        state += f": {parent['error']}"
    print(f"parent {parent['address']}: {state}")
    print_table(
        ("topic", "partition", "state", "offset", "lag", "reason"),
        [
            (log["topic"], log["partition"], log["state"], log["offset"], _number(log["lag"]), log["why"] or "-")
            for log in parent["logs"]
        ],
    )


def _print_children(children: list[dict[str, Any]]) -> None:
    if not children:
        print("no child is connected")
        return
    print()
    print_table(
        ("child", "level", "address", "logs", "lag", "bytes_per_second"),
        [
            (child["name"], child["level"], child["address"], child["logs"], child["lag"], child["bytes_per_second"])
            for child in children
        ],
    )


def _number(value: int | None) -> str:
    return "-" if value is None else str(value)
