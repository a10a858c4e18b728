"""`edgebroker wait`: wait until the nodes below have applied a topic."""

from __future__ import annotations

import argparse
import json
import sys
from urllib.parse import urlencode

from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.command import Parser, admin_flag, duration, json_flag, label_flag
from edgebroker.cli.commands.tree import check_labels, silence
from edgebroker.cli.progress import CLEAR_LINE
from edgebroker.common.errors import ConfigError
from edgebroker.common.runtime.clock import SystemClock, sleep

POLL_SECONDS = 1.0


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=wait)
    parser.description = (
        "Wait until every node of the lowest level below (terminals, where there are any) has applied a topic: its "
        "consumer groups have acknowledged all records up to an offset, and show them where they say what they show. "
        "--label level=pos chooses another level. When the time is over, list the nodes that have not, and exit with 1."
    )
    parser.add_argument("--topic", required=True)
    parser.add_argument(
        "--offset",
        type=int,
        default=-1,
        metavar="N",
        help="next offset to reach (default: the current end of the topic)",
    )
    parser.add_argument(
        "--partition",
        type=int,
        default=-1,
        metavar="N",
        help="only this partition (default: all); required with --offset when the topic has several",
    )
    parser.add_argument("--group", default="", help="only this group counts (default: all groups of a node)")
    parser.add_argument("--mirrored", action="store_true", help="wait only until the nodes have replicated it")
    parser.add_argument(
        "--timeout", type=duration, default="30m", metavar="TIME", help="for example 90s, 30m, 12h (default 30m)"
    )
    label_flag(parser)
    admin_flag(parser)
    json_flag(parser)


def wait(options: argparse.Namespace) -> int:
    """0 once every node has applied it, 1 when the time is over first."""
    check_labels(options.label)
    clock = SystemClock()
    deadline = clock.monotonic() + options.timeout
    ends = _ends(options)
    query = [("topic", options.topic), *(("end", f"{partition}:{end}") for partition, end in ends.items())]
    query += [("label", label) for label in options.label]
    query += [("group", options.group)] if options.group else []
    query += [("mirrored", "1")] if options.mirrored else []
    while True:
        found = call(options.admin, "GET", "/v1/tree/applied?" + urlencode(query))
        known = found["settled"] and not found["refused"]
        complete = known and found["nodes"] and found["done"] == found["nodes"]
        if complete or clock.monotonic() >= deadline:
            break
        if not options.json and sys.stderr.isatty():
            print(f"{CLEAR_LINE}{found['done']} of {found['nodes']} nodes ", end="", file=sys.stderr, flush=True)
        sleep(min(POLL_SECONDS, max(0.0, deadline - clock.monotonic())))
    if options.json:
        print(json.dumps({**found, "ends": ends}))
        return 0 if complete else 1
    verb = "replicated" if options.mirrored else "applied"
    nodes = f"{found['level']} nodes" if found["level"] else "nodes"
    print(f"{CLEAR_LINE}{found['done']} of {found['nodes']} {nodes} have {verb} {options.topic}", file=sys.stderr)
    if not found["nodes"]:
        which = "with these labels" if options.label else "below"
        print(f"no node {which} has reported yet; see edgebroker tree --all", file=sys.stderr)
    if not found["settled"]:
        print("this node started a moment ago and may not know all nodes yet", file=sys.stderr)
    if found["refused"]:
        print("there are more nodes than this node can keep; the others are not counted", file=sys.stderr)
    for node in found["missing"]:
        silent = f", silent for {silence(node['silent_seconds'])}" if node["silent_seconds"] >= 0 else ""
        print(f"{node['name']}: {node['why']}{silent}")
    left = found["nodes"] - found["done"] - len(found["missing"])
    if left > 0:
        print(f"and {left} more")
    return 0 if complete else 1


def _ends(options: argparse.Namespace) -> dict[int, int]:
    """The next offset to reach, by partition: that of --offset, or the current end."""
    partitions = call(options.admin, "GET", api_path("topics", options.topic))["partitions"]
    if options.offset >= 0 and options.partition < 0 and len(partitions) > 1:
        raise ConfigError(f"topic {options.topic} has {len(partitions)} partitions; choose one with --partition")
    ends = {
        part["partition"]: options.offset if options.offset >= 0 else part["durable_end"]
        for part in partitions
        if options.partition < 0 or part["partition"] == options.partition
    }
    if not ends:
        raise ConfigError(
            f"--partition {options.partition}: topic {options.topic} has the partitions 0 to {len(partitions) - 1}"
        )
    return ends
