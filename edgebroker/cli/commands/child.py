"""`edgebroker child list|forget`: the children that a node remembers, and what it keeps for them."""

from __future__ import annotations

import argparse
import json

from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.command import Parser, admin_flag, json_flag, subcommand, subcommands
from edgebroker.cli.render import duration, print_table, size


def arguments(parser: Parser) -> None:
    parser.description = "Show the children that a node remembers, and forget those that are gone for good."
    commands = subcommands(parser)
    list_parser = subcommand(commands, "list", "list the children of a node", list_children)
    forget_parser = subcommand(commands, "forget", "keep nothing more for a child that is gone for good", forget)
    forget_parser.description = (
        "For storage.hold_ms a node removes nothing early that a child has not fetched yet. A child that was forgotten "
        "and comes back continues where the logs begin then; what was removed meanwhile is a gap for its readers."
    )
    forget_parser.add_argument("name", help="name or uid of the child")
    for each in (list_parser, forget_parser):
        admin_flag(each)
        json_flag(each)


def list_children(options: argparse.Namespace) -> int:
    holders = call(options.admin, "GET", "/v1/holders")["holders"]
    children = [holder for holder in holders if holder["kind"] == "child"]
    if options.json:
        print(json.dumps(children))
        return 0
    print_table(
        ("child", "uid", "silent", "holds", "logs"),
        [
            (
                child["name"],
                child["uid"],
                duration(child["silent_seconds"]) if child["silent_seconds"] else "-",
                "given up" if child["given_up"] else size(child["bytes"]),
                child["logs"],
            )
            for child in children
        ],
    )
    return 0


def forget(options: argparse.Namespace) -> int:
    call(options.admin, "DELETE", api_path("children", options.name))
    print(json.dumps({"child": options.name}) if options.json else f"{options.name}: forgotten")
    return 0
