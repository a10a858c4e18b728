"""The tree as an operator sees it from one node: how many are there, behind, silent; who has applied what.

Everything is worked out from the reports when it is asked for, some hundred nodes a turn: nothing else waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import nlargest
from typing import Any, NamedTuple

import msgspec

from edgebroker.common.scheduler import Scheduler
from edgebroker.network.http.server import Reply, Response
from edgebroker.pipe.fleet import Fleet, FleetMember, matches
from edgebroker.pipe.follower import LEVELS
from edgebroker.pipe.report import Report

SLICE = 200
PAGE = 500
WORST = 20
MOST_MISSING = 100
BEHIND_SECONDS = 60.0
WRONG_CLOCK_SECONDS = 60
STATES = ("silent", "behind", "applying", "problems")
Query = dict[str, list[str]]
Badness = tuple[float, float, int, int]


class Facts(NamedTuple):
    """What there is to say about a node now; `waiting`: records that are there and not applied, by topic and group."""

    silent: float
    lag: float
    waiting: dict[tuple[str, str], int]
    problems: list[str]
    states: list[str]

    @property
    def badness(self) -> Badness:
        """The worst node has the most of it."""
        return self.silent, self.lag, len(self.problems), sum(self.waiting.values())


class FleetView:
    """Owned by the loop thread. `uid` and `name` are this node's; `decided` tells what an operator decided about a
    node, `logs_of` which logs of a topic are here (a digest, 0: none), `settled` if all nodes can be known by now."""

    def __init__(
        self,
        scheduler: Scheduler,
        fleet: Fleet,
        uid: str,
        name: str,
        decided: Callable[[str], dict[str, object]],
        logs_of: Callable[[str], int],
        settled: Callable[[], bool],
    ) -> None:
        self._scheduler, self._fleet, self._decided = scheduler, fleet, decided
        self._logs_of, self._settled = logs_of, settled
        self._uid, self._name = uid, name

    def summary(self, query: Query, reply: Reply) -> None:
        """GET /v1/tree: counts by level and label, and the worst nodes."""
        wanted = _labels(query)
        counted: dict[tuple[str, str], dict[str, int]] = {}
        names = self._names()
        worst: list[tuple[Badness, FleetMember]] = []

        def take(member: FleetMember) -> None:
            if not matches(member, wanted):
                return
            facts = self._facts(member, names)
            keys = [("level", member.level), *member.labels.items()]
            if member.region:
                keys.append(("region", member.region.partition("/")[0]))
            for key in keys:
                counts = counted.get(key)
                if counts is None:
                    counts = counted[key] = dict.fromkeys(("nodes", *STATES), 0)
                counts["nodes"] += 1
                for state in facts.states:
                    counts[state] += 1
            if facts.states:
                worst.append((facts.badness, member))
                if len(worst) > 50 * WORST:
                    worst[:] = nlargest(WORST, worst, key=_badness)

        def done() -> None:
            labels = sorted(key for key in counted if key[0] != "level")
            answer = {
                "node": self._name,
                "levels": {level: counted["level", level] for level in LEVELS if ("level", level) in counted},
                "labels": {"=".join(key): counted[key] for key in labels},
                "worst": [self._node(member, names) for _, member in nlargest(WORST, worst, key=_badness)],
                "refused": self._fleet.refused,
            }
            reply(Response(200, answer))

        self._each(list(self._fleet.members.values()), take, done)

    def nodes(self, query: Query, reply: Reply) -> None:
        """GET /v1/tree/nodes: a page of all of them, in the order of their uids, behind `after`."""
        wanted, after = _labels(query), query.get("after", [""])[0]
        names = self._names()
        found: list[dict[str, Any]] = []
        last = [""]

        def take(member: FleetMember) -> bool:
            if not matches(member, wanted):
                return False
            if len(found) == PAGE:
                last[0] = str(found[-1]["uid"])
                return True
            found.append({**self._node(member, names), "topics": msgspec.to_builtins(member.report().topics)})
            return False

        members = [self._fleet.members[uid] for uid in sorted(uid for uid in self._fleet.members if uid > after)]
        self._each(members, take, lambda: reply(Response(200, {"nodes": found, "after": last[0]})))

    def applied(self, query: Query, reply: Reply) -> None:
        """GET /v1/tree/applied: which nodes have a topic up to an offset, and have applied it."""
        try:
            topic = query["topic"][0]
            wanted_ends = {int(p): int(o) for p, _, o in (text.partition(":") for text in query.get("end", []))}
            if min(wanted_ends, default=0) < 0:
                raise ValueError
        except (KeyError, ValueError):
            reply(Response(400, {"error": "topic=NAME and end=PARTITION:OFFSET (as often as need be) are expected"}))
            return
        group, mirrored = query.get("group", [""])[0], "mirrored" in query
        wanted = {"level": "local", **_labels(query)}
        counts = {"nodes": 0, "done": 0}
        logs = self._logs_of(topic)
        missing: list[dict[str, object]] = []

        def take(member: FleetMember) -> None:
            if not matches(member, wanted):
                return
            counts["nodes"] += 1
            why = _lacks(member.report(), topic, wanted_ends, group, mirrored, logs)
            if not why:
                counts["done"] += 1
                return
            silent = self._fleet.silent_for(member, self._scheduler.now())
            if len(missing) < MOST_MISSING:
                missing.append({"uid": member.uid, "name": member.name, "why": why, "silent_seconds": round(silent, 1)})

        members = list(self._fleet.members.values())
        known = {"refused": self._fleet.refused, "settled": self._settled()}
        self._each(members, take, lambda: reply(Response(200, {**counts, **known, "missing": missing})))

    # ---- one node ----

    def _node(self, member: FleetMember, names: dict[str, int]) -> dict[str, Any]:
        facts, report = self._facts(member, names), member.report()
        parent = self._fleet.members.get(member.parent)
        return {
            "uid": member.uid,
            "name": member.name,
            "level": member.level,
            "region": member.region,
            "labels": member.labels,
            "version": report.version,
            "address": member.address,
            "parent": self._name
            if member.parent == self._uid
            else parent.name
            if parent is not None
            else member.parent,
            "managed": member.managed,
            "silent_seconds": round(facts.silent, 1),
            "lag_seconds": round(facts.lag, 1),
            "waiting": {" ".join(key): count for key, count in facts.waiting.items()},
            "problems": facts.problems,
            "skew_seconds": member.skew,
            "disk_free_percent": report.disk_free_percent,
            "disk_days": report.disk_days,
            "resyncs": msgspec.to_builtins(report.resyncs),
            "left_out": report.left_out,
            "states": facts.states,
            **self._decided(member.uid),
        }

    def _facts(self, member: FleetMember, names: dict[str, int]) -> Facts:
        now, report = self._scheduler.now(), member.report()
        silent, lag = self._fleet.silent_for(member, now), self._fleet.lag(member, now)
        waiting: dict[tuple[str, str], int] = {}
        letters, refreshing = 0, False
        for topic in report.topics:
            letters += topic.dead_letters
            for group in topic.groups:
                refreshing = refreshing or group.refreshing
                if group.applied != topic.ends:
                    ends = zip(topic.ends, group.applied, strict=False)
                    left = sum(max(0, end - max(0, applied)) for end, applied in ends)
                    if left:
                        waiting[topic.name, group.name] = left
        problems = list(report.problems)
        if report.left_out:
            problems.append(f"{report.left_out} topics had no room in its report")
        if letters:
            problems.append(f"{letters} dead letters")
        if member.twins(now):
            problems.append("uid_in_use")
        if silent < 0 and names.get(member.name, 0) > 1:
            problems.append("name_in_use")
        if abs(member.skew) >= WRONG_CLOCK_SECONDS:
            problems.append(f"clock {member.skew:+d} s")
        holds = (silent >= 0, lag >= BEHIND_SECONDS, bool(waiting) or refreshing, bool(problems))
        return Facts(silent, lag, waiting, problems, [state for state, one in zip(STATES, holds, strict=True) if one])

    def _names(self) -> dict[str, int]:
        """How many connected nodes go by a name."""
        found: dict[str, int] = {}
        for member in self._fleet.members.values():
            if member.silent_since is None:
                found[member.name] = found.get(member.name, 0) + 1
        return found

    def _each(
        self, members: list[FleetMember], take: Callable[[FleetMember], object], done: Callable[[], None]
    ) -> None:
        """Until one of them says that it is enough."""

        def turn(first: int) -> None:
            if any(take(member) for member in members[first : first + SLICE]):
                done()
            elif first + SLICE < len(members):
                self._scheduler.call_later(0.0, lambda: turn(first + SLICE))
            else:
                done()

        turn(0)


def _lacks(report: Report, topic: str, ends: dict[int, int], group: str, mirrored: bool, logs: int) -> str:
    """Why a node has not applied a topic up to these offsets; "" when it has."""
    found = next((one for one in report.topics if one.name == topic), None)
    if found is None:
        return "no room for the topic in its report; ask it itself" if report.left_out else "does not have the topic"
    if logs and found.logs and found.logs != logs:
        return "has another topic of that name, that was deleted here or replaced"
    for partition, end in ends.items():
        here = found.ends[partition] if partition < len(found.ends) else -1
        if here < end:
            return f"partition {partition} ends at {max(here, 0)}"
    groups = [one for one in found.groups if group in ("", one.name)]
    if mirrored:
        return ""
    if not groups:
        return f"no group {group}".rstrip() + " reads it"
    for one in groups:
        if one.refreshing:
            return f"group {one.name} is refreshing"
        for partition, end in ends.items():
            applied = one.applied[partition] if partition < len(one.applied) else -1
            if applied < end:
                return f"group {one.name} is at {max(0, applied)} of partition {partition}"
    return ""


def _labels(query: Query) -> dict[str, str]:
    return dict(text.partition("=")[::2] for text in query.get("label", []))


def _badness(entry: tuple[Badness, FleetMember]) -> Badness:
    return entry[0]
