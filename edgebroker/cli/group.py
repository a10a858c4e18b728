"""`edgebroker group list|describe`."""

from __future__ import annotations

import argparse
import json
from urllib.parse import quote

from edgebroker.cli.adminclient import call
from edgebroker.cli.table import print_table


def list_groups(options: argparse.Namespace) -> int:
    groups = call(options.admin, "GET", "/v1/groups")["groups"]
    if options.json:
        print(json.dumps(groups))
        return 0
    print_table(
        ("group", "partitions", "members", "lag"),
        [
            (
                group["name"],
                len(group["partitions"]),
                len({part["member"]["client_id"] for part in group["partitions"] if part["member"]}),
                sum(max(0, part["lag"]) for part in group["partitions"]),
            )
            for group in groups
        ],
    )
    return 0


def describe(options: argparse.Namespace) -> int:
    group = call(options.admin, "GET", f"/v1/groups/{quote(options.name)}")
    if options.json:
        print(json.dumps(group))
        return 0
    print(f"group {group['name']}, generation {group['generation']}")
    print_table(
        ("topic", "partition", "committed", "durable_end", "lag", "in_flight", "state", "member"),
        [
            (
                part["topic"],
                part["partition"],
                part["committed"],
                part["durable_end"],
                part["lag"],
                part["member"]["in_flight"] if part["member"] else "-",
                part["member"]["state"] if part["member"] else "-",
                part["member"]["client_id"] if part["member"] else "-",
            )
            for part in group["partitions"]
        ],
    )
    return 0
