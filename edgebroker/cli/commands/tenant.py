"""`edgebroker tenant`: what those that share the nodes of a fleet may have; changed at its root."""

from __future__ import annotations

import argparse
import json

from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.command import Parser, admin_flag, at_least, json_flag, subcommand, subcommands
from edgebroker.cli.render import print_table, size

# Flags, keys of the quota, and what they limit at each node.
QUOTA = (
    ("stored", "stored_bytes", "bytes that its topics take"),
    ("in", "in_bytes_per_second", "bytes a second that its applications send"),
    ("out", "out_bytes_per_second", "bytes a second that are delivered to them"),
    ("connections", "connections", "connections of its applications"),
    ("partitions", "partitions", "partitions of its topics"),
    ("groups", "groups", "its consumer groups"),
)


def arguments(parser: Parser) -> None:
    commands = subcommands(parser)
    list_parser = subcommand(commands, "list", "list what tenants have at this node, and may have", list_tenants)
    set_parser = subcommand(commands, "set", "set the quota of a tenant; what is not named is not limited", set_quota)
    set_parser.add_argument(
        "name", metavar="NAME", help="its topics, groups and applications are called NAME or NAME.*"
    )
    for flag, key, what in QUOTA:
        set_parser.add_argument(
            f"--{flag}", dest=key, type=at_least(0), default=0, metavar="N", help=f"{what}, at a node"
        )
    delete_parser = subcommand(commands, "delete", "do not limit a tenant any more", delete)
    delete_parser.add_argument("name", metavar="NAME")
    for each in (list_parser, set_parser, delete_parser):
        admin_flag(each)
        json_flag(each)


def list_tenants(options: argparse.Namespace) -> int:
    tenants = call(options.admin, "GET", "/v1/tenants")["tenants"]
    if options.json:
        print(json.dumps(tenants))
        return 0
    rows = []
    for one in tenants:
        quota = one["quota"]
        counts = [_of(str(one[key]), quota[key]) for key in ("connections", "partitions", "groups")]
        stored = _of(size(one["stored_bytes"]), quota["stored_bytes"] and size(quota["stored_bytes"]))
        rates = [
            f"{size(quota[key])}/s" if quota[key] else "-" for key in ("in_bytes_per_second", "out_bytes_per_second")
        ]
        rows.append((one["name"], stored, *rates, *counts))
    print_table(("tenant", "stored", "in", "out", "connections", "partitions", "groups"), rows)
    return 0


def _of(has: str, most: object) -> str:
    return f"{has} of {most}" if most else has


def set_quota(options: argparse.Namespace) -> int:
    quota = {key: getattr(options, key) for _, key, _ in QUOTA}
    call(options.admin, "PUT", api_path("tenants", options.name), quota)
    print(json.dumps(quota) if options.json else f"the quota of {options.name} is set")
    return 0


def delete(options: argparse.Namespace) -> int:
    call(options.admin, "DELETE", api_path("tenants", options.name))
    print(json.dumps({"deleted": options.name}) if options.json else f"{options.name} is not limited any more")
    return 0
