"""`edgebroker verify`: compare the logs of two nodes byte for byte.

Both nodes read their batches from the disk and answer with digests. Where these differ, a binary search finds the
records. Only digests cross the network.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.command import Parser, admin_flag, json_flag
from edgebroker.cli.render import counted
from edgebroker.common.errors import EdgeBrokerError


class SharedLog(NamedTuple):
    """A log that two nodes have, and the offsets [first, next) that both store."""

    name: str
    request: dict[str, Any]
    first: int
    next: int


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=verify)
    parser.description = (
        "Compare the logs of this node with those of another one, byte for byte, and name the records that differ. "
        "Exits with 0 when they are the same, 1 when not."
    )
    parser.add_argument(
        "--against",
        required=True,
        metavar="NODE",
        help="the other node: the name of one below, or the HOST:PORT at which nodes reach it (listen.pipe)",
    )
    parser.add_argument("--topic", default="", help="only this topic (default: all that both nodes have)")
    admin_flag(parser)
    json_flag(parser)


class Comparison:
    """Compares the logs of this node and another one, which this one asks."""

    def __init__(self, admin: str, there: str) -> None:
        self._admin, self._here, self._there = admin, "this node", there
        self.damaged: set[tuple[str, int, int]] = set()
        self.bytes = 0

    def shared(self, topic: str) -> tuple[list[SharedLog], list[str]]:
        """The logs that both nodes have, and descriptions of what only one of them has."""
        here = _logs(self._admin, "/v1/topics", topic)
        there = _logs(self._admin, api_path("peers", self._there, "topics"), topic)
        if topic and not (here or there):
            raise EdgeBrokerError(f"topic {topic!r} exists at neither node")
        found, left_out = [], []
        for name, mine in here.items():
            other = there.get(name)
            if other is None:
                left_out.append(f"{name}: not at {self._there}")
            elif other["log_id"] != mine["log_id"]:
                left_out.append(f"{name}: another log at {self._there}")
            else:
                first = max(_whole_from(mine), _whole_from(other))
                end = min(mine["durable_end"], other["durable_end"])
                request = {"topic": mine["topic"], "partition": mine["partition"], "log_id": mine["log_id"]}
                found.append(SharedLog(name, request, first, end))
                for node, one in ((self._here, mine), (self._there, other)):
                    if one["log_start"] < first:
                        left_out.append(f"{name}: records {one['log_start']} to {first - 1} are not at both nodes")
                    if one["durable_end"] > end:
                        left_out.append(f"{name}: records {end} to {one['durable_end'] - 1} are only at {node}")
        left_out += [f"{name}: not at {self._here}" for name in there if name not in here]
        return found, left_out

    def differing(self, log: SharedLog) -> list[tuple[int, int]]:
        """Offset ranges [first, next) whose batches are not the same."""
        found: list[tuple[int, int]] = []
        offset = log.first
        while offset < log.next:
            mine, other = self._digests(log, offset, log.next)
            self.bytes += mine["bytes"]
            for node, answer in ((self._here, mine), (self._there, other)):
                self.damaged |= {(f"{log.name} at {node}", *span) for span in answer["damaged"]}
            end = min(mine["next"], other["next"])
            if not _same(mine, other):
                first = self._first(log, offset, end)
                last = self._last(log, first, end)
                if found and found[-1][1] == first:
                    first = found.pop()[0]
                found.append((first, last))
            offset = end
        return found

    def _first(self, log: SharedLog, low: int, high: int) -> int:
        """The offset up to which everything from `low` on is the same."""
        while high - low > 1:
            middle = (low + high) // 2
            mine, other = self._digests(log, low, middle)
            if _same(mine, other):
                low = mine["next"]
            else:
                high = middle
        return low

    def _last(self, log: SharedLog, low: int, high: int) -> int:
        """The offset from which everything up to `high` is the same."""
        end = high
        while end - low > 1:
            middle = (low + end) // 2
            if self._same_from(log, middle, high):
                end = middle
            else:
                low = middle
        return end

    def _same_from(self, log: SharedLog, first: int, end: int) -> bool:
        while first < end:
            mine, other = self._digests(log, first, end)
            if not _same(mine, other):
                return False
            first = mine["next"]
        return True

    def _digests(self, log: SharedLog, first: int, end: int) -> tuple[Any, ...]:
        body = {**log.request, "first": first, "next": end}
        paths = ("/v1/pipe/digest", api_path("peers", self._there, "digest"))
        return tuple(call(self._admin, "POST", path, body) for path in paths)


def verify(options: argparse.Namespace) -> int:
    comparison = Comparison(options.admin, options.against)
    logs, left_out = comparison.shared(options.topic)
    differing = {log.name: comparison.differing(log) for log in logs}
    same = not any(differing.values()) and not comparison.damaged
    if options.json:
        result = {
            "same": same,
            "compared": {log.name: [log.first, log.next] for log in logs},
            "bytes": comparison.bytes,
            "differing": {name: spans for name, spans in differing.items() if spans},
            "damaged": sorted(comparison.damaged),
            "left_out": left_out,
        }
        print(json.dumps(result))
        return 0 if same else 1
    for log in logs:
        for first, end in differing[log.name]:
            print(f"{log.name}: records {first} to {end - 1} DIFFER")
        if not differing[log.name]:
            records = counted(max(0, log.next - log.first), "record")
            print(f"{log.name}: {records} from offset {log.first}: the same")
    for name, first, end in sorted(comparison.damaged):
        print(f"{name}: records {first} to {end - 1} are damaged")
    for line in left_out:
        print(line)
    verdict = "the same" if same else "NOT the same"
    print(f"{counted(len(logs), 'log')} compared, {comparison.bytes} bytes read at each node: {verdict}")
    return 0 if same else 1


def _whole_from(log: dict[str, Any]) -> int:
    """Where a log begins, or goes on behind its last gap."""
    return max([int(log["log_start"]), *(int(gap["last"]) + 1 for gap in log["gaps"])])


def _same(mine: Any, other: Any) -> bool:
    return bool((mine["next"], mine["sha256"]) == (other["next"], other["sha256"]))


def _logs(admin: str, path: str, topic: str) -> dict[str, dict[str, Any]]:
    return {
        f"{found['name']}/{log['partition']}": {**log, "topic": found["name"]}
        for found in call(admin, "GET", path)["topics"]
        if topic in ("", found["name"])
        for log in found["partitions"]
    }
