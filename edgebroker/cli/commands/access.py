"""`edgebroker access`: who may do what with topics and groups, and with nodes; changed at the root of the fleet."""

from __future__ import annotations

import argparse
import json
from typing import Any
from urllib.parse import urlencode

from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.command import Parser, admin_flag, json_flag, subcommand, subcommands
from edgebroker.cli.render import print_table

RULES = "'produce TOPICS', 'consume TOPICS as GROUPS', 'create TOPICS', view, alter, operate or admin"


def arguments(parser: Parser) -> None:
    commands = subcommands(parser)
    show_parser = subcommand(commands, "show", "show the rules about principals", show)
    show_parser.add_argument("name", nargs="?", metavar="PRINCIPAL", help="only this one")
    test_parser = subcommand(commands, "test", "what a principal may do at this node; exit code 1: it may not", test)
    test_parser.add_argument("name", metavar="PRINCIPAL")
    test_parser.add_argument("right", metavar="RIGHT", help="produce, consume, create, view, alter, operate or admin")
    test_parser.add_argument("topic", nargs="?", default="", metavar="TOPIC")
    test_parser.add_argument("--group", default="", metavar="GROUP", help="the group in which it is consumed")
    each = [show_parser, test_parser]
    for name, key, summary in (
        ("grant", "allow", "allow a principal to do something"),
        ("deny", "deny", "deny it; what is denied stays so whatever else is allowed"),
        ("remove", "remove", "remove rules, of either kind"),
    ):
        change_parser = subcommand(commands, name, summary, change)
        change_parser.set_defaults(key=key)
        change_parser.add_argument(
            "name", metavar="PRINCIPAL", help="an application, unix:USER, or local: programs of the machine of a node"
        )
        change_parser.add_argument("rules", nargs="+", metavar="RULE", help=RULES)
        each.append(change_parser)
    delete_parser = subcommand(commands, "delete", "delete a principal, its rules and its tokens", delete)
    delete_parser.add_argument("name", metavar="PRINCIPAL")
    each.append(delete_parser)
    for one in each:
        admin_flag(one)
        json_flag(one)


def show(options: argparse.Namespace) -> int:
    if options.name:
        found = [call(options.admin, "GET", api_path("access", options.name))]
    else:
        found = call(options.admin, "GET", "/v1/access")["principals"]
    if options.json:
        print(json.dumps(found))
    else:
        _print(found)
    return 0


def _print(principals: list[dict[str, Any]]) -> None:
    if not principals:
        print("no rules: programs of the machine of a node may do everything, those of other machines nothing")
        return
    rows = []
    for one in principals:
        lines = [*(f"deny {rule}" for rule in one["deny"]), *(f"allow {rule}" for rule in one["allow"])] or ["-"]
        for rank, line in enumerate(lines):
            region, tokens = one["region"] or "(all)", str(len(one["tokens"]))
            rows.append((one["name"], region, tokens, line) if rank == 0 else ("", "", "", line))
    print_table(("principal", "region", "tokens", "rule"), rows)


def test(options: argparse.Namespace) -> int:
    query = urlencode({"right": options.right, "topic": options.topic, "group": options.group})
    found = call(options.admin, "GET", f"{api_path('access', options.name, 'test')}?{query}")
    if options.json:
        print(json.dumps(found))
    else:
        print(found["why"] or f"{options.name} may do this")
    return 0 if found["allowed"] else 1


def change(options: argparse.Namespace) -> int:
    found = call(options.admin, "POST", api_path("access", options.name), {options.key: options.rules})
    if options.json:
        print(json.dumps(found))
    else:
        _print([found])
    return 0


def delete(options: argparse.Namespace) -> int:
    call(options.admin, "DELETE", api_path("access", options.name))
    print(json.dumps({"deleted": options.name}) if options.json else f"{options.name} is deleted")
    return 0
