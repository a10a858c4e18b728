"""`edgebroker tree`, `edgebroker wait` and `edgebroker node`: the nodes below one, seen and moved from there."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urlencode

from edgebroker.cli.admin_client import call
from edgebroker.cli.render import print_table
from edgebroker.common.clock import SystemClock, sleep
from edgebroker.common.errors import ConfigError
from edgebroker.common.levels import LEVELS

WATCH_SECONDS = 5.0
POLL_SECONDS = 1.0
CLEAR = "\x1b[H\x1b[2J"
CLEAR_LINE = "\r\x1b[K" if sys.stderr.isatty() else ""
_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def tree(options: argparse.Namespace) -> int:
    while True:
        if options.all:
            nodes = sorted(
                pages(options.admin, options.label), key=lambda node: (LEVELS.index(node["level"]), node["name"])
            )
            text = json.dumps(nodes) if options.json else ""
        else:
            found = call(options.admin, "GET", "/v1/tree?" + _labels(options.label))
            text = json.dumps(found) if options.json else ""
        if options.watch and not options.json:
            sys.stdout.write(CLEAR)
        if text:
            print(text, flush=True)
        elif options.all:
            _table(nodes)
        else:
            _summary(found)
        if not options.watch:
            return 0
        sys.stdout.flush()
        sleep(WATCH_SECONDS)


def pages(admin: str, labels: list[str]) -> Iterator[dict[str, Any]]:
    """Every node below that has these labels."""
    after = ""
    while True:
        page = call(admin, "GET", f"/v1/tree/nodes?after={after}&" + _labels(labels))
        yield from page["nodes"]
        after = page["after"]
        if not after:
            return


def _summary(found: dict[str, Any]) -> None:
    if not found["levels"]:
        print(f"no node below {found['node']} has reported yet")
        return
    columns = ("nodes", "silent", "behind", "applying", "problems")
    print_table(
        ("below " + found["node"], *columns),
        [
            (name, *(counts[one] for one in columns))
            for name, counts in [*found["levels"].items(), *found["labels"].items()]
        ],
    )
    if found["worst"]:
        print()
        _table(found["worst"])
    else:
        print("every node is connected, has everything, and has applied it")
    if found["refused"]:
        print(f"{found['refused']} reports of nodes beyond the limit were not taken", file=sys.stderr)


def _table(nodes: list[dict[str, Any]]) -> None:
    print_table(
        ("node", "level", "region", "parent", "silent", "lag", "applying", "disk", "version", "problems"),
        [
            (
                node["name"],
                node["level"],
                node["region"] or "-",
                node["parent"] or "-",
                _duration(node["silent_seconds"]),
                _duration(node["lag_seconds"]) if node["lag_seconds"] >= 1 else "-",
                _most(node["waiting"]),
                f"{node['disk_free_percent']} %" + (f", {node['disk_days']} d" if node["disk_days"] >= 0 else ""),
                node["version"],
                ", ".join([*node["problems"], *(["draining"] if node.get("draining") else [])]) or "-",
            )
            for node in nodes
        ],
    )


def _most(waiting: dict[str, int]) -> str:
    """The two groups that have most before them."""
    most = sorted(waiting, key=lambda name: -waiting[name])
    text = ", ".join(f"{name} {waiting[name]}" for name in most[:2])
    return text + (f" and {len(most) - 2} more" if len(most) > 2 else "") or "-"


def _duration(seconds: float) -> str:
    if seconds < 0:
        return "-"
    for unit in ("d", "h", "m"):
        if seconds >= 2 * _UNITS[unit]:
            return f"{seconds / _UNITS[unit]:.0f} {unit}"
    return f"{seconds:.0f} s"


def wait(options: argparse.Namespace) -> int:
    """0 once every node has applied it; 1 when the time is over first, with those that have not."""
    clock = SystemClock()
    deadline = clock.monotonic() + parse_duration(options.timeout)
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
    print(f"\r{found['done']} of {found['nodes']} nodes have {options.topic}", file=sys.stderr)
    if not found["nodes"]:
        print("no node with these labels has reported; see edgebroker tree --all", file=sys.stderr)
    if not found["settled"]:
        print("this node was started a moment ago: it may not know all nodes yet", file=sys.stderr)
    if found["refused"]:
        print("there are more nodes than are kept; not all of them can be asked", file=sys.stderr)
    for node in found["missing"]:
        silent = f", silent for {_duration(node['silent_seconds'])}" if node["silent_seconds"] >= 0 else ""
        print(f"{node['name']}: {node['why']}{silent}")
    left = found["nodes"] - found["done"] - len(found["missing"])
    if left > 0:
        print(f"and {left} more")
    return 0 if complete else 1


def _ends(options: argparse.Namespace) -> dict[int, int]:
    """What has to be applied: up to the offset that was named, or to where the topic ends now."""
    partitions = call(options.admin, "GET", f"/v1/topics/{quote(options.topic)}")["partitions"]
    if options.offset >= 0 and options.partition < 0 and len(partitions) > 1:
        raise ConfigError(f"{options.topic} has {len(partitions)} partitions: say which one with --partition")
    ends = {
        one["partition"]: options.offset if options.offset >= 0 else one["durable_end"]
        for one in partitions
        if options.partition < 0 or one["partition"] == options.partition
    }
    if not ends:
        raise ConfigError(f"--partition {options.partition}: {options.topic} has {len(partitions)} partitions")
    return ends


def parse_duration(text: str) -> float:
    """30, 30s, 30m, 12h, 2d: seconds. Raises ConfigError for what is none."""
    unit = _UNITS.get(text[-1:], 0)
    try:
        seconds = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < 1e9:
        raise ConfigError(f"{text!r} is no duration; write it as 90s, 30m, 12h or 2d")
    return seconds


def pin(options: argparse.Namespace) -> int:
    return _decide(options, "PUT", "/pins", {"parents": options.parent})


def unpin(options: argparse.Namespace) -> int:
    return _decide(options, "PUT", "/pins", {"parents": []})


def drain(options: argparse.Namespace) -> int:
    return _decide(options, "PUT", "/drain")


def undrain(options: argparse.Namespace) -> int:
    return _decide(options, "DELETE", "/drain")


def remove(options: argparse.Namespace) -> int:
    return _decide(options, "DELETE", "")


def _decide(options: argparse.Namespace, method: str, verb: str, body: object = None) -> int:
    answer = call(options.admin, method, f"/v1/registry/{quote(options.name, safe='')}{verb}", body)
    if options.json:
        print(json.dumps(answer))
    return 0


def _labels(labels: list[str]) -> str:
    for label in labels:
        if "=" not in label:
            raise ConfigError(f"--label {label}: NAME=VALUE is expected, for example region=north")
    return urlencode([("label", label) for label in labels])
