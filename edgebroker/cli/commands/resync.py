"""`edgebroker resync`: load topics again from the parent, at this node or, in waves, at nodes below."""

from __future__ import annotations

import argparse
import json
import re
import secrets
import sys
from collections.abc import Iterator
from typing import Any

from edgebroker.cli import render
from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.command import Parser, admin_flag, at_least, duration, json_flag, label_flag
from edgebroker.cli.commands.tree import nodes_below, silence
from edgebroker.cli.progress import CLEAR_LINE
from edgebroker.cli.render import print_table
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.common.runtime.clock import SystemClock, sleep

POLL_SECONDS, LINE_SECONDS = 1.0, 10.0
# A node that has been silent for so long is not waited for.
LOST_SECONDS = 60.0
UNDER_WAY = ("waiting", "loading", "switching", "refreshing")
GOOD = ("done", "held")
RESYNCS_PER_REQUEST = 1 << 20


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=resync)
    parser.description = (
        "Load topics again from the parent, into a copy beside the data that is being served, and switch in one step. "
        "Without --node, --region or --label this node does it; with one of them, the nodes below that it selects."
    )
    parser.add_argument("--topic", default="", help="topic (default: all topics that the node replicates)")
    parser.add_argument("--group", default="", help="let this consumer group load the topic again, instead of the node")
    parser.add_argument("--node", default="", metavar="NAME", help="at this node below, by name or uid")
    parser.add_argument("--region", default="", help="at every node below in this region")
    label_flag(parser)
    parser.add_argument("--wave", type=at_least(1), default=10, metavar="N", help="nodes at a time (default 10)")
    parser.add_argument(
        "--in-place", action="store_true", help="make no copy: delete the old data first, to save disk space"
    )
    parser.add_argument(
        "--force", action="store_true", help="also when the parent has less than 90 %% of the records that are here"
    )
    parser.add_argument("--accept", action="store_true", help="also when the parent has another log of the topic")
    parser.add_argument(
        "--hours", default="", metavar="HH:MM-HH:MM", help="switch only at this time of day, by the clock of the node"
    )
    parser.add_argument(
        "--timeout",
        type=duration,
        default="2h",
        metavar="TIME",
        help="for each wave, for example 90s, 30m, 12h (default 2h)",
    )
    parser.add_argument(
        "--id", default="", help="continue this resync of the node with other --force, --accept or --hours"
    )
    parser.add_argument("--status", action="store_true", help="list the resyncs of the node")
    parser.add_argument("--abort", default="", metavar="ID", help="abort a resync of the node, before it switches")
    admin_flag(parser)
    json_flag(parser)


def resync(options: argparse.Namespace) -> int:
    if options.status:
        return _status(options)
    if options.abort:
        call(options.admin, "DELETE", api_path("resyncs", options.abort))
        return 0
    if options.group and not options.topic:
        raise ConfigError("--group needs --topic, the topic that the group loads again")
    if options.id and (options.node or options.region or options.label):
        raise ConfigError(
            "--id continues a resync of one node; name that node with --admin, not --node, --region or --label"
        )
    if options.id and not re.fullmatch(r"[0-9a-f]{32}", options.id):
        raise ConfigError(f"--id {options.id}: not the id of a resync; edgebroker resync --status shows them")
    if options.id and not options.topic:
        raise ConfigError("--id needs --topic; edgebroker resync --status shows both")
    below = bool(options.node or options.region or options.label)
    targets = list(_below(options)) if below else [_here(options)]
    if not targets:
        raise EdgeBrokerError("no node below matches --node, --region and --label; see edgebroker tree --all")
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
    for node in nodes_below(options.admin, labels):
        if options.node in ("", node["name"], node["uid"]):
            yield node


def _wave(options: argparse.Namespace, nodes: list[dict[str, Any]], below: bool, results: dict[str, str]) -> None:
    """Request a resync at these nodes, and wait until it has ended at all of them."""
    ids: dict[str, str] = {}
    names = {node["uid"]: node["name"] for node in nodes}
    for node in nodes:
        request = {
            "type": "resync", "id": options.id or secrets.token_hex(16), "uid": node["uid"], "topic": options.topic,
            "group": options.group, "in_place": options.in_place, "force": options.force, "accept": options.accept,
            "hours": options.hours, "seconds": options.timeout,
        }  # fmt: skip
        try:
            call(options.admin, "POST", "/v1/resyncs", request)
            ids[node["uid"]] = str(request["id"])
        except EdgeBrokerError as error:
            if not below:
                raise
            results[node["name"]] = f"not requested: {error}"
    clock = SystemClock()
    deadline = clock.monotonic() + options.timeout
    left, silent = dict(ids), dict[str, float]()
    told = AnswerCount(options.json, len(ids))
    while left:
        states, silent = _states_below(options, left) if below else (_states_here(options, left), {})
        for uid, state in states.items():
            results[names[uid]] = state
            if state.split(":")[0] not in UNDER_WAY:
                del left[uid]
        # Who was lost for long is not waited for: the request stays for its time.
        if all(silent.get(uid, -1.0) > LOST_SECONDS for uid in left) or clock.monotonic() > deadline:
            break
        told.show(len(ids) - len(left))
        sleep(POLL_SECONDS)
    for uid in left:
        if silent.get(uid, -1.0) >= 0:
            results[names[uid]] = f"not reached, silent for {silence(silent[uid])}"
        else:
            results.setdefault(names[uid], "requested, not reported yet")
    told.over()


class AnswerCount:
    """How many nodes have answered: on a terminal one line that changes, else a line now and then."""

    def __init__(self, quiet: bool, nodes: int) -> None:
        self._quiet, self._nodes = quiet, nodes
        self._terminal = sys.stderr.isatty()
        self._shown, self._due = -1, 0.0

    def show(self, answered: int) -> None:
        now = SystemClock().monotonic()
        if self._quiet or (not self._terminal and (answered == self._shown or now < self._due)):
            return
        self._shown, self._due = answered, now + LINE_SECONDS
        text = f"{answered} of {self._nodes} nodes have answered"
        print(f"{CLEAR_LINE}{text} " if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr,
              flush=True)  # fmt: skip

    def over(self) -> None:
        if not self._quiet and self._terminal:
            print(CLEAR_LINE, end="", file=sys.stderr)


def _states_here(options: argparse.Namespace, ids: dict[str, str]) -> dict[str, str]:
    rows = [(one["id"], one["state"], one["why"]) for one in call(options.admin, "GET", "/v1/resyncs")["resyncs"]]
    return {uid: _state(rows, resync_id) for uid, resync_id in ids.items()}


def _states_below(options: argparse.Namespace, ids: dict[str, str]) -> tuple[dict[str, str], dict[str, float]]:
    """What nodes answered, and for how long they have been silent."""
    found, silent = {}, {}
    for node in nodes_below(options.admin, []):
        if node["uid"] in ids:
            silent[node["uid"]] = node["silent_seconds"]
            rows = [(resync_id, state, "") for resync_id, _, state in node["resyncs"]]
            state = _state(rows, ids[node["uid"]])
            if state:
                found[node["uid"]] = state
    return found, silent


def _state(rows: list[tuple[str, str, str]], resync_id: str) -> str:
    """The state of a request: its resyncs, one for each topic, have consecutive ids. "" when none is known yet."""
    first = int(resync_id, 16)
    mine = [(state, why) for one, state, why in rows if 0 <= int(one, 16) - first < RESYNCS_PER_REQUEST]
    for state, _ in mine:
        if state in UNDER_WAY:
            return state
    for state, why in mine:
        if state not in GOOD:
            return f"{state}: {why}" if why else state
    return mine[-1][0] if mine else ""


def _status(options: argparse.Namespace) -> int:
    answer = call(options.admin, "GET", "/v1/resyncs")
    found, pending = answer["resyncs"], answer["pending"]
    if options.json:
        print(json.dumps(answer))
        return 0
    if pending:
        print_table(
            ("id", "topic", "node", "silent", "given up in"),
            [
                (
                    one["id"],
                    one["topic"] or "-",
                    one["name"],
                    silence(one["silent_seconds"]),
                    render.duration(one["seconds_left"]),
                )
                for one in pending
            ],
        )
    if found or not pending:
        print_table(
            ("id", "topic", "group", "state", "reason"),
            [(one["id"], one["topic"], one["group"] or "-", one["state"], one["why"] or "-") for one in found],
        )
    return 0
