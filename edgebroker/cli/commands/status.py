"""`edgebroker status`: the state of a node on one screen."""

from __future__ import annotations

import argparse
import json
from typing import Any

from edgebroker.broker.observe.problems import ADVICE
from edgebroker.cli.admin_client import ask, call
from edgebroker.cli.command import Parser, admin_flag, json_flag
from edgebroker.cli.render import counted, duration, print_table, size
from edgebroker.cli.totals import byte_count, dead_letter_counts, group_lag, record_count

MOST_LINES = 10
VERDICTS = {"ok": "HEALTHY", "degraded": "DEGRADED", "not ready": "NOT READY"}


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=status)
    parser.description = (
        "Show the state of a node: its problems and what to do about them, parent, disk, topics and groups. Exits "
        "with 0 when the node is healthy or degraded, 1 when it is not ready, 3 when it does not answer."
    )
    admin_flag(parser)
    json_flag(parser)


def status(options: argparse.Namespace) -> int:
    """0 when the node is healthy or degraded, 1 when it is not ready."""
    admin = options.admin
    node, pipe = call(admin, "GET", "/v1/node"), call(admin, "GET", "/v1/pipe")
    verdict = ask(admin, "/readyz")[1]
    topics = call(admin, "GET", "/v1/topics")["topics"]
    groups = call(admin, "GET", "/v1/groups")["groups"]
    holders = call(admin, "GET", "/v1/holders")["holders"]
    if options.json:
        found = {"verdict": verdict, "node": node, "pipe": pipe, "topics": topics, "groups": groups, "holders": holders}
        print(json.dumps(found))
    else:
        _print_node(verdict, node)
        _print_parent(pipe, node)
        _print_disk(node["storage"])
        _print_holders(holders)
        _print_topics(topics)
        _print_awaited(node["awaited_topics"])
        _print_groups(groups)
        pending = sum(line["pending"] for line in dead_letter_counts(topics, groups))
        if pending:
            print(f"\n{counted(pending, 'dead letter')} pending (edgebroker dlq list)")
    return 1 if verdict["status"] == "not ready" else 0


def _print_node(verdict: dict[str, Any], node: dict[str, Any]) -> None:
    print(
        f"{VERDICTS[verdict['status']]}: {node['name']} ({node['level']}), edgebroker {node['version']}, up for "
        f"{duration(node['uptime_seconds'])}, {counted(node['connections'], 'client')}"
    )
    if verdict["checks"]["started"] != "ok":
        print(f"  the node is {verdict['checks']['started']}")
    for name, why in {**node["problems"], **verdict["warnings"]}.items():
        print(f"  {name}: {why}\n    do: {ADVICE.get(name, 'see the log')}")


def _print_parent(pipe: dict[str, Any], node: dict[str, Any]) -> None:
    parent, children = pipe["parent"], pipe["children"]
    if parent is None:
        line = "none (this is the root)" if node["level"] == "root" else "none configured (pipe.parents, pipe.registry)"
    else:
        lag = sum(log["lag"] or 0 for log in parent["logs"])
        waiting = [log for log in parent["logs"] if log["why"]]
        heard = parent["heard_seconds_ago"]
        line = f"{parent['name'] or '?'} at {parent['address']}, "
        line += "connected" if parent["connected"] else "NOT CONNECTED"
        line += f", last contact {duration(heard)} ago" if heard is not None else ", no contact yet"
        line += f", lag {counted(lag, 'record')}" if lag else ", no lag" if parent["connected"] else ""
        line += f", {counted(len(waiting), 'log')} waiting (edgebroker pipe)" if waiting else ""
    print(f"parent    {line}")
    if children:
        print(f"children  {len(children)} connected, {sum(1 for child in children if child['lag'])} of them behind")


def _print_disk(storage: dict[str, Any]) -> None:
    if "disk_free_bytes" not in storage:
        print("storage   in memory: all records are lost when the node stops")
        return
    sync = storage["sync_seconds"] / storage["commit_groups"] if storage["commit_groups"] else 0.0
    print(
        f"disk      {size(storage['disk_free_bytes'])} of {size(storage['disk_bytes'])} free, logs "
        f"{size(storage['log_bytes'])}, a sync takes {sync * 1000:.1f} ms "
        f"(slowest {storage['slowest_sync_seconds'] * 1000:.1f} ms)"
    )


def _print_holders(holders: list[dict[str, Any]]) -> None:
    """Silent ones that keep segments from being removed."""
    silent = [holder for holder in holders if holder["bytes"] and holder["silent_seconds"] and not holder["given_up"]]
    for holder in silent[:3]:
        print(
            f"held      {size(holder['bytes'])} for {holder['kind']} {holder['name']}, silent for "
            f"{duration(holder['silent_seconds'])}"
        )


def _print_topics(topics: list[dict[str, Any]]) -> None:
    if not topics:
        print("\nno topics yet")
        return
    print()
    largest = sorted(topics, key=byte_count, reverse=True)
    rows = [
        (
            topic["name"],
            topic["settings"]["kind"],
            len(topic["partitions"]),
            record_count(topic),
            size(byte_count(topic)),
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


def _print_awaited(topics: dict[str, int]) -> None:
    for name, count in list(topics.items())[:MOST_LINES]:
        print(f"waiting   {counted(count, 'client')} for topic {name}, which is not here")


def _print_groups(groups: list[dict[str, Any]]) -> None:
    groups = [group for group in groups if not group["name"].startswith("__")]
    if not groups:
        return
    print()
    behind = sorted(groups, key=lambda group: -group_lag(group)[0])
    rows = [(group["name"], len(group["members"]), *_lag_cells(group)) for group in behind[:MOST_LINES]]
    print_table(("group", "members", "lag", "lag time"), rows)
    if len(groups) > MOST_LINES:
        print(f"and {len(groups) - MOST_LINES} more (edgebroker group list)")


def _lag_cells(group: dict[str, Any]) -> tuple[object, str]:
    records, seconds = group_lag(group)
    return records or "-", duration(seconds) if records else "-"
