"""`edgebroker tree`: the nodes below this one."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

from edgebroker.cli import render
from edgebroker.cli.admin_client import call
from edgebroker.cli.command import Parser, admin_flag, json_flag, label_flag
from edgebroker.cli.render import counted, print_table
from edgebroker.common.errors import ConfigError
from edgebroker.common.levels import LEVELS
from edgebroker.common.runtime.clock import sleep

WATCH_SECONDS = 5.0
CLEAR_SCREEN = "\x1b[H\x1b[2J"


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=tree)
    parser.description = (
        "Show the nodes below this one, by level and label: how many there are, and which are silent, behind or have "
        "problems."
    )
    parser.add_argument("--all", action="store_true", help="list every node, not only the 20 worst")
    parser.add_argument("--watch", action="store_true", help="repeat every five seconds until Ctrl-C")
    label_flag(parser)
    admin_flag(parser)
    json_flag(parser)


def tree(options: argparse.Namespace) -> int:
    while True:
        if options.all:
            nodes = sorted(
                nodes_below(options.admin, options.label), key=lambda node: (LEVELS.index(node["level"]), node["name"])
            )
            text = json.dumps(nodes) if options.json else ""
        else:
            found = call(options.admin, "GET", "/v1/tree?" + label_query(options.label))
            text = json.dumps(found) if options.json else ""
        if options.watch and not options.json:
            sys.stdout.write(CLEAR_SCREEN)
        if text:
            print(text, flush=True)
        elif options.all:
            _print_nodes(nodes)
        else:
            _print_summary(found)
        if not options.watch:
            return 0
        sys.stdout.flush()
        sleep(WATCH_SECONDS)


def nodes_below(admin: str, labels: list[str]) -> Iterator[dict[str, Any]]:
    """Every node below that has all of these labels."""
    after = ""
    while True:
        page = call(admin, "GET", f"/v1/tree/nodes?after={after}&" + label_query(labels))
        yield from page["nodes"]
        after = page["after"]
        if not after:
            return


def _print_summary(found: dict[str, Any]) -> None:
    if not found["levels"]:
        print(f"no node below {found['node']} has reported yet")
        return
    columns = ("nodes", "silent", "behind", "applying", "problems")
    print_table(
        ("below " + found["node"], *columns),
        [
            (name, *(counts[column] for column in columns))
            for name, counts in [*found["levels"].items(), *found["labels"].items()]
        ],
    )
    if found["worst"]:
        print()
        _print_nodes(found["worst"])
    else:
        print(
            "every node is connected, without lag, and has applied everything, as of "
            f"{render.duration(found['evidence_seconds'])} ago"
        )
    if found["truncated_records"]:
        records = counted(found["truncated_records"], "record")
        print(f"{records} truncated, for the parent's log is another one; retained beside the logs for a day")
    if found["refused"]:
        reports = counted(found["refused"], "report")
        print(f"{reports} rejected: there are more nodes than this node can keep", file=sys.stderr)


def _print_nodes(nodes: list[dict[str, Any]]) -> None:
    print_table(
        ("node", "level", "region", "parent", "silent", "lag", "applying", "disk free", "version", "problems"),
        [
            (
                node["name"],
                node["level"],
                node["region"] or "-",
                node["parent"] or "-",
                silence(node["silent_seconds"]),
                render.duration(node["lag_seconds"]) if node["lag_seconds"] >= 1 else "-",
                _furthest_behind(node["waiting"]),
                f"{node['disk_free_percent']} %" + (f", {node['disk_days']} d" if node["disk_days"] >= 0 else ""),
                node["version"],
                ", ".join([*node["problems"], *(["draining"] if node.get("draining") else [])]) or "-",
            )
            for node in nodes
        ],
    )


def _furthest_behind(waiting: dict[str, int]) -> str:
    """The two groups with the largest lag."""
    most = sorted(waiting, key=lambda name: -waiting[name])
    text = ", ".join(f"{name} {waiting[name]}" for name in most[:2])
    return text + (f" and {len(most) - 2} more" if len(most) > 2 else "") or "-"


def silence(seconds: float) -> str:
    """How long a node has been silent; "-" for one that is connected."""
    return render.duration(seconds) if seconds >= 0 else "-"


def check_labels(labels: list[str]) -> None:
    """Raises ConfigError for what is not NAME=VALUE."""
    for label in labels:
        if "=" not in label:
            raise ConfigError(f"--label {label}: not NAME=VALUE, for example region=north")


def label_query(labels: list[str]) -> str:
    """The labels as a query of the admin interface."""
    check_labels(labels)
    return urlencode([("label", label) for label in labels])
