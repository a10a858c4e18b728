"""`edgebroker resync`: nodes load topics afresh from their parents, so many at a time, and what came of it."""

from __future__ import annotations

import argparse
import json
import secrets
import sys
from collections.abc import Iterator
from typing import Any

from edgebroker.cli.admin_client import call
from edgebroker.cli.commands.tree import CLEAR_LINE, pages, parse_duration
from edgebroker.cli.render import print_table
from edgebroker.common.clock import SystemClock, sleep
from edgebroker.common.errors import ConfigError, EdgeBrokerError

POLL_SECONDS = 1.0
UNDER_WAY = ("waiting", "loading", "switching", "refreshing")
GOOD = ("done", "held")


def resync(options: argparse.Namespace) -> int:
    if options.status:
        return _status(options)
    if options.abort:
        call(options.admin, "DELETE", f"/v1/resyncs/{options.abort}")
        return 0
    if options.group and not options.topic:
        raise ConfigError("--group needs --topic: which topic the group shall load afresh")
    if options.id and (options.node or options.region or options.label):
        raise ConfigError("--id is for the resets of one node; ask that node (--admin)")
    if options.id and not options.topic:
        raise ConfigError("--id needs --topic: see edgebroker resync --status")
    if options.wave < 1:
        raise ConfigError("--wave: at least 1 node at a time")
    below = bool(options.node or options.region or options.label)
    targets = list(_below(options)) if below else [_here(options)]
    if not targets:
        raise EdgeBrokerError("no node below is meant by that; see edgebroker tree --all")
    results: dict[str, str] = {}
    for first in range(0, len(targets), options.wave):
        _wave(options, targets[first : first + options.wave], below, results)
    bad = [name for name, state in results.items() if state not in GOOD]
    if options.json:
        print(json.dumps(results))
    else:
        print_table(("node", "resync"), sorted(results.items()))
    return 1 if bad else 0


def _here(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, Any] = call(options.admin, "GET", "/v1/node")
    return found


def _below(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    labels = [*options.label, *([f"region={options.region}"] if options.region else [])]
    for node in pages(options.admin, labels):
        if options.node in ("", node["name"], node["uid"]):
            yield node


def _wave(options: argparse.Namespace, nodes: list[dict[str, Any]], below: bool, results: dict[str, str]) -> None:
    """Order it at some nodes, and wait until all of them are done with it, one way or another."""
    ids: dict[str, str] = {}
    names = {node["uid"]: node["name"] for node in nodes}
    for node in nodes:
        order = {
            "type": "resync", "id": options.id or secrets.token_hex(16), "uid": node["uid"], "topic": options.topic,
            "group": options.group, "in_place": options.in_place, "force": options.force, "accept": options.accept,
            "hours": options.hours,
        }  # fmt: skip
        try:
            call(options.admin, "POST", "/v1/resyncs", order)
            ids[node["uid"]] = str(order["id"])
        except EdgeBrokerError as error:
            if not below:
                raise
            results[node["name"]] = f"not ordered: {error}"
    clock = SystemClock()
    deadline = clock.monotonic() + parse_duration(options.timeout)
    left = dict(ids)
    while left:
        states = _states_below(options, left) if below else _states_here(options, left)
        for uid, state in states.items():
            results[names[uid]] = state
            if state.split(":")[0] not in UNDER_WAY:
                del left[uid]
        if not left or clock.monotonic() > deadline:
            break
        if not options.json and sys.stderr.isatty():
            print(f"\r{len(ids) - len(left)} of {len(ids)} nodes ", end="", file=sys.stderr, flush=True)
        sleep(POLL_SECONDS)
    for uid in left:
        results.setdefault(names[uid], "ordered, and nothing heard of it yet")
    if not options.json:
        print(CLEAR_LINE, end="", file=sys.stderr)


def _states_here(options: argparse.Namespace, ids: dict[str, str]) -> dict[str, str]:
    rows = [(one["id"], one["state"], one["why"]) for one in call(options.admin, "GET", "/v1/resyncs")["resyncs"]]
    return {uid: _state(rows, resync_id) for uid, resync_id in ids.items()}


def _states_below(options: argparse.Namespace, ids: dict[str, str]) -> dict[str, str]:
    found = {}
    for node in pages(options.admin, []):
        if node["uid"] in ids:
            rows = [(resync_id, state, "") for resync_id, _, state in node["resyncs"]]
            state = _state(rows, ids[node["uid"]])
            if state:
                found[node["uid"]] = state
    return found


def _state(rows: list[tuple[str, str, str]], resync_id: str) -> str:
    """Of an order: all of its resets, one for each topic, have ids from this one on. "" when nothing is known of it."""
    first = int(resync_id, 16)
    mine = [(state, why) for one, state, why in rows if 0 <= int(one, 16) - first < 1 << 20]
    for state, _ in mine:
        if state in UNDER_WAY:
            return state
    for state, why in mine:
        if state not in GOOD:
            return f"{state}: {why}" if why else state
    return mine[-1][0] if mine else ""


def _status(options: argparse.Namespace) -> int:
    found = call(options.admin, "GET", "/v1/resyncs")["resyncs"]
    if options.json:
        print(json.dumps(found))
    else:
        print_table(
            ("id", "topic", "group", "state", "why"),
            [(one["id"], one["topic"], one["group"] or "-", one["state"], one["why"] or "-") for one in found],
        )
    return 0
