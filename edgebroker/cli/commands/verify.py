"""`edgebroker verify --against HOST:PORT`: are the logs of two nodes the same, byte for byte?

Both nodes read their batches again and answer digests; where these differ, halves of the place are compared, until the
differing records are known. Only digests go over the line.
"""

from __future__ import annotations

import argparse
import json
from typing import Any, NamedTuple

from edgebroker.cli.admin_client import call
from edgebroker.common.errors import EdgeBrokerError


class Pair(NamedTuple):
    """The same log at two nodes, of which both have the offsets [first, next)."""

    name: str
    request: dict[str, Any]
    first: int
    next: int


class Comparison:
    """Compares the logs of this node and another one."""

    def __init__(self, here: str, there: str) -> None:
        self._here, self._there = here, there
        self.damaged: set[tuple[str, int, int]] = set()
        self.bytes = 0

    def pairs(self, topic: str) -> tuple[list[Pair], list[str]]:
        """What both have, and in words what only one of them has."""
        here, there = _logs(self._here, topic), _logs(self._there, topic)
        if topic and not (here or there):
            raise EdgeBrokerError(f"there is no topic {topic!r} at either node")
        found, left_out = [], []
        for name, mine in here.items():
            other = there.get(name)
            if other is None:
                left_out.append(f"{name}: not at {self._there}")
            elif other["log_id"] != mine["log_id"]:
                left_out.append(f"{name}: another log at {self._there}")
            else:
                first = max(mine["log_start"], other["log_start"])
                following = min(mine["durable_end"], other["durable_end"])
                request = {"topic": mine["topic"], "partition": mine["partition"], "log_id": mine["log_id"]}
                found.append(Pair(name, request, first, following))
                for node, log in ((self._here, mine), (self._there, other)):
                    if log["log_start"] < first:
                        left_out.append(f"{name}: records {log['log_start']} to {first - 1} are only at {node}")
                    if log["durable_end"] > following:
                        left_out.append(f"{name}: records {following} to {log['durable_end'] - 1} are only at {node}")
        left_out += [f"{name}: not at {self._here}" for name in there if name not in here]
        return found, left_out

    def differing(self, pair: Pair) -> list[tuple[int, int]]:
        """Offset ranges [first, next) whose batches are not the same."""
        found: list[tuple[int, int]] = []
        offset = pair.first
        while offset < pair.next:
            mine, other = self._digests(pair, offset, pair.next)
            self.bytes += mine["bytes"]
            for node, answer in ((self._here, mine), (self._there, other)):
                self.damaged |= {(f"{pair.name} at {node}", *place) for place in answer["damaged"]}
            following = min(mine["next"], other["next"])
            if not _same(mine, other):
                first = self._first(pair, offset, following)
                last = self._last(pair, first, following)
                if found and found[-1][1] == first:
                    first = found.pop()[0]
                found.append((first, last))
            offset = following
        return found

    def _first(self, pair: Pair, low: int, high: int) -> int:
        """Everything from `low` on is the same up to the answer."""
        while high - low > 1:
            middle = (low + high) // 2
            mine, other = self._digests(pair, low, middle)
            if _same(mine, other):
                low = mine["next"]
            else:
                high = middle
        return low

    def _last(self, pair: Pair, low: int, high: int) -> int:
        """Everything from the answer on is the same up to `high`."""
        end = high
        while end - low > 1:
            middle = (low + end) // 2
            if self._same_from(pair, middle, high):
                end = middle
            else:
                low = middle
        return end

    def _same_from(self, pair: Pair, first: int, following: int) -> bool:
        while first < following:
            mine, other = self._digests(pair, first, following)
            if not _same(mine, other):
                return False
            first = mine["next"]
        return True

    def _digests(self, pair: Pair, first: int, following: int) -> tuple[Any, ...]:
        body = {**pair.request, "first": first, "next": following}
        return tuple(call(node, "POST", "/v1/pipe/digest", body) for node in (self._here, self._there))


def verify(options: argparse.Namespace) -> int:
    comparison = Comparison(options.admin, options.against)
    pairs, left_out = comparison.pairs(options.topic)
    differing = {pair.name: comparison.differing(pair) for pair in pairs}
    same = not any(differing.values()) and not comparison.damaged
    if options.json:
        result = {
            "same": same,
            "compared": {pair.name: [pair.first, pair.next] for pair in pairs},
            "bytes": comparison.bytes,
            "differing": {name: places for name, places in differing.items() if places},
            "damaged": sorted(comparison.damaged),
            "left_out": left_out,
        }
        print(json.dumps(result))
        return 0 if same else 1
    for pair in pairs:
        for first, following in differing[pair.name]:
            print(f"{pair.name}: records {first} to {following - 1} DIFFER")
        if not differing[pair.name]:
            print(f"{pair.name}: {max(0, pair.next - pair.first)} records from {pair.first} on are the same")
    for name, first, following in sorted(comparison.damaged):
        print(f"{name}: records {first} to {following - 1} are damaged")
    for line in left_out:
        print(line)
    verdict = "the same" if same else "NOT the same"
    print(f"{len(pairs)} logs compared, {comparison.bytes} bytes read at each node: {verdict}")
    return 0 if same else 1


def _same(mine: Any, other: Any) -> bool:
    return bool((mine["next"], mine["sha256"]) == (other["next"], other["sha256"]))


def _logs(node: str, topic: str) -> dict[str, dict[str, Any]]:
    return {
        f"{found['name']}/{log['partition']}": {**log, "topic": found["name"]}
        for found in call(node, "GET", "/v1/topics")["topics"]
        if topic in ("", found["name"])
        for log in found["partitions"]
    }
