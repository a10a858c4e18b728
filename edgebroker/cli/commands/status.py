"""`edgebroker status`: one screen about a node; `edgebroker check`: the same for a monitoring system (as Nagios)."""

from __future__ import annotations

import argparse
import json
from typing import Any

from edgebroker.broker.observe.problems import ADVICE
from edgebroker.cli.admin_client import ask, call
from edgebroker.cli.commands.dlq import letters
from edgebroker.cli.render import print_table
from edgebroker.common.errors import EdgeBrokerError, UnreachableError

OK, WARNING, CRITICAL, UNKNOWN = 0, 1, 2, 3
WORDS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
MOST_LINES = 10


def status(options: argparse.Namespace) -> int:
    """0 when the node is well or only degraded, 1 when it is not ready, 3 when it does not answer."""
    admin = options.admin
    verdict = ask(admin, "/readyz")[1]
    node, pipe = call(admin, "GET", "/v1/node"), call(admin, "GET", "/v1/pipe")
    topics = call(admin, "GET", "/v1/topics")["topics"]
    groups = call(admin, "GET", "/v1/groups")["groups"]
    if options.json:
        print(json.dumps({"verdict": verdict, "node": node, "pipe": pipe, "topics": topics, "groups": groups}))
    else:
        _print_node(verdict, node)
        _print_parent(pipe, node)
        _print_disk(node["storage"])
        _print_topics(topics)
        _print_groups(groups)
        waiting = sum(line["pending"] for line in letters(admin, topics))
        if waiting:
            print(f"\n{waiting} dead letters wait for somebody (edgebroker dlq list)")
    return 1 if verdict["status"] == "not ready" else 0


def _print_node(verdict: dict[str, Any], node: dict[str, Any]) -> None:
    words = {"ok": "HEALTHY", "degraded": "DEGRADED", "not ready": "NOT READY"}
    print(
        f"{words[verdict['status']]}: {node['name']} ({node['level']}), edgebroker {node['version']}, up for "
        f"{_duration(node['uptime_seconds'])}, {node['connections']} clients"
    )
    if verdict["checks"]["started"] != "ok":
        print(f"  it is {verdict['checks']['started']}")
    for name, why in {**node["problems"], **verdict["warnings"]}.items():
        print(f"  {name}: {why}\n    do: {ADVICE.get(name, 'see the log')}")


def _print_parent(pipe: dict[str, Any], node: dict[str, Any]) -> None:
    parent, children = pipe["parent"], pipe["children"]
    if parent is None:
        line = "none: this node is at the top" if node["level"] == "root" else "none is configured (pipe.parents)"
    else:
        lag = sum(one["lag"] or 0 for one in parent["logs"])
        waiting = [one for one in parent["logs"] if one["why"]]
        heard = parent["heard_seconds_ago"]
        line = f"{parent['name'] or '?'} at {parent['address']}, "
        line += "connected" if parent["connected"] else "NOT CONNECTED"
        line += f", heard {_duration(heard)} ago" if heard is not None else ", never heard"
        line += f", {lag} records behind" if lag else ", nothing missing" if parent["connected"] else ""
        line += f", {len(waiting)} logs wait (edgebroker pipe)" if waiting else ""
    print(f"parent    {line}")
    if children:
        print(f"children  {len(children)} connected, {sum(1 for one in children if one['lag'])} of them behind")


def _print_disk(storage: dict[str, Any]) -> None:
    if "disk_free_bytes" not in storage:
        print("storage   in memory: nothing survives a stop")
        return
    sync = storage["sync_seconds"] / storage["commit_groups"] if storage["commit_groups"] else 0.0
    print(
        f"disk      {_size(storage['disk_free_bytes'])} of {_size(storage['disk_bytes'])} free, logs "
        f"{_size(storage['log_bytes'])}, a sync takes {sync * 1000:.1f} ms (slowest "
        f"{storage['slowest_sync_seconds'] * 1000:.0f} ms)"
    )


def _print_topics(topics: list[dict[str, Any]]) -> None:
    if not topics:
        print("\nno topics yet")
        return
    print()
    largest = sorted(topics, key=lambda topic: -sum(part["bytes"] for part in topic["partitions"]))
    rows = [
        (
            topic["name"],
            topic["settings"]["kind"],
            len(topic["partitions"]),
            sum(part["durable_end"] - part["log_start"] for part in topic["partitions"]),
            _size(sum(part["bytes"] for part in topic["partitions"])),
            sum(
                corrupt["last"] - corrupt["first"] + 1
                for part in topic["partitions"]
                for corrupt in part.get("damaged", [])
            )
            or "-",
        )
        for topic in largest[:MOST_LINES]
    ]
    print_table(("topic", "kind", "partitions", "records", "size", "damaged"), rows)
    if len(topics) > MOST_LINES:
        print(f"and {len(topics) - MOST_LINES} more (edgebroker topic list)")


def _print_groups(groups: list[dict[str, Any]]) -> None:
    groups = [group for group in groups if not group["name"].startswith("__")]
    if not groups:
        return
    print()
    behind = sorted(groups, key=lambda group: -_lag(group)[0])
    rows = [(group["name"], len(group["members"]), *_lag_words(group)) for group in behind[:MOST_LINES]]
    print_table(("group", "members", "lag", "behind for"), rows)
    if len(groups) > MOST_LINES:
        print(f"and {len(groups) - MOST_LINES} more (edgebroker group list)")


def _lag(group: dict[str, Any]) -> tuple[int, float]:
    """(records, seconds of the partition that is furthest behind)"""
    parts = group["partitions"]
    return (
        sum(max(0, part["lag"]) for part in parts),
        max((part["lag_seconds"] for part in parts), default=0.0),
    )


def _lag_words(group: dict[str, Any]) -> tuple[object, str]:
    records, seconds = _lag(group)
    return records or "-", _duration(seconds) if records else "-"


# ---- for a monitoring system ----


def live(options: argparse.Namespace) -> int:
    """Does the event loop turn?"""

    def look() -> tuple[int, str]:
        return (OK, "it answers") if ask(options.admin, "/healthz")[0] == 200 else (CRITICAL, "it does not answer")

    return _report("live", look, options.healthcheck)


def ready(options: argparse.Namespace) -> int:
    """Can it take and deliver records? A missing parent is a warning."""

    def look() -> tuple[int, str]:
        code, verdict = ask(options.admin, "/readyz")
        bad = [f"{name}: {why}" for name, why in verdict["checks"].items() if why != "ok"]
        warnings = [f"{name}: {why}" for name, why in verdict["warnings"].items()]
        if code != 200:
            return CRITICAL, "; ".join(bad + warnings)
        return (WARNING, "; ".join(warnings)) if warnings else (OK, "ready")

    return _report("ready", look, options.healthcheck)


def lag(options: argparse.Namespace) -> int:
    """How far behind are the groups, in seconds or records?"""

    def look() -> tuple[int, str]:
        groups = call(options.admin, "GET", "/v1/groups")["groups"]
        wanted = [
            group
            for group in groups
            if group["name"] == options.group or (not options.group and not group["name"].startswith("__"))
        ]
        if options.group and not wanted:
            return UNKNOWN, f"there is no group {options.group} on this node"
        unit = "records" if options.records else "s"
        state, said, data = OK, [], []
        for group in wanted:
            value = _lag(group)[0 if options.records else 1]
            found = CRITICAL if value >= options.critical else WARNING if value >= options.warning else OK
            state = max(state, found)
            if found != OK:
                said.append(f"group {group['name']} is {value:g} {unit} behind")
            limits = f"{options.warning:g};{options.critical:g}"
            data.append(f"'{group['name']}'={value:g}{'' if options.records else 's'};{limits}")
        text = "; ".join(said) or f"{len(wanted)} groups are within {options.warning:g} {unit}"
        return state, f"{text} | {' '.join(data)}" if data else text

    return _report("lag", look)


def _report(name: str, look: Any, healthcheck: bool = False) -> int:
    """One line and the exit code that Nagios and its kind expect; a node that does not answer is critical. For the
    `healthcheck` of a container engine, which knows only 0 and 1, a warning is well: it would restart the node."""
    try:
        state, text = look()
    except UnreachableError as error:
        state, text = CRITICAL, str(error)
    except EdgeBrokerError as error:
        state, text = UNKNOWN, str(error)
    print(f"EDGEBROKER {name.upper()} {WORDS[state]}: {text}")
    return int(state not in (OK, WARNING)) if healthcheck else int(state)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError
