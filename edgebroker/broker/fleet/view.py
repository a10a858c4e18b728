"""The tree as an operator sees it from one node: how many are there, behind, silent; who has applied what.

Everything is worked out from the reports when it is asked for, some hundred nodes a turn: nothing else waits for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import nlargest
from typing import NamedTuple

import msgspec

from edgebroker.broker.feed.downstream import SILENT_SECONDS
from edgebroker.common.levels import LEVELS
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.scheduler import Scheduler, in_slices
from edgebroker.network.http.router import Call, Query
from edgebroker.pipe.fleet import Fleet, FleetMember, matches
from edgebroker.pipe.report import Report, ResyncReport, TopicReport

SLICE = 200
PAGE = 500
WORST = 20
# Levels, regions and values of labels that are counted: nodes call themselves what they like.
MOST_COUNTED = 1000
MOST_MISSING = 100
BEHIND_SECONDS = 60.0
WRONG_CLOCK_SECONDS = 60
STATES = ("silent", "behind", "applying", "problems")
Badness = tuple[float, float, int, int]


class Decisions(msgspec.Struct, frozen=True):
    """What an operator decided about a node, where the registry is kept."""

    pins: list[str]
    draining: bool


class Counts(msgspec.Struct):
    """Nodes, and how many of them are in each of STATES."""

    nodes: int = 0
    silent: int = 0
    behind: int = 0
    applying: int = 0
    problems: int = 0


class NodeView(msgspec.Struct, kw_only=True):
    """A node as it is seen from here. `waiting`: records that are there and not applied, by topic and group. Seconds
    are -1 where they do not apply; `truncated_records` since its start; `pins` and `draining` are told where the
    registry is kept, `topics` in the list."""

    uid: str
    name: str
    level: str
    region: str
    labels: dict[str, str]
    version: str
    address: str
    parent: str
    managed: bool
    silent_seconds: float
    lag_seconds: float
    waiting: dict[str, int]
    problems: list[str]
    skew_seconds: int
    disk_free_percent: int
    disk_days: int
    truncated_records: int
    resyncs: list[ResyncReport]
    left_out: int
    states: list[str]
    pins: list[str] | msgspec.UnsetType = msgspec.UNSET
    draining: bool | msgspec.UnsetType = msgspec.UNSET
    topics: list[TopicReport] | msgspec.UnsetType = msgspec.UNSET


class TreeSummary(msgspec.Struct, kw_only=True):
    """Counts by level and label, and the worst nodes. `truncated_records`: of all nodes together. `refused`: reports of
    nodes beyond the limit. `evidence_seconds`: so long ago the node that was heard last of all was heard; what changed
    since is not in this."""

    node: str
    levels: dict[str, Counts]
    labels: dict[str, Counts]
    worst: list[NodeView]
    truncated_records: int
    refused: int
    evidence_seconds: float


class NodePage(msgspec.Struct):
    """A page of nodes; `after` is where the next one begins, "" at the last one."""

    nodes: list[NodeView]
    after: str


class MissingNode(msgspec.Struct):
    """A node that has not applied a topic, and why."""

    uid: str
    name: str
    why: str
    silent_seconds: float


class Applied(msgspec.Struct, kw_only=True):
    """How many nodes of the lowest level there are (`level`, "" when no node was found), how many have applied a topic,
    and those that have not (at most MOST_MISSING)."""

    level: str
    nodes: int
    done: int
    refused: int
    settled: bool
    missing: list[MissingNode]


class Facts(NamedTuple):
    """What there is to say about a node now; `waiting`: records that are there and not applied, by topic and group."""

    silent: float
    lag: float
    waiting: dict[tuple[str, str], int]
    problems: list[str]
    states: list[str]
    truncated_records: int

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
        decided: Callable[[str], Decisions | None],
        logs_of: Callable[[str], int],
        ends_of: Callable[[str], list[int]],
        evidence: Callable[[], float],
        settled: Callable[[], bool],
    ) -> None:
        self._scheduler, self._fleet, self._decided = scheduler, fleet, decided
        self._logs_of, self._ends_of, self._settled = logs_of, ends_of, settled
        self._evidence = evidence
        self._uid, self._name = uid, name

    def summary(self, call: Call) -> None:
        """GET /v1/tree: counts by level and label, and the worst nodes."""
        wanted = labels_of(call.query)
        counted: dict[tuple[str, str], Counts] = {}
        names = self._names()
        worst: list[tuple[Badness, FleetMember]] = []
        deepest, truncated_records = 1, 0

        def take(member: FleetMember) -> None:
            nonlocal deepest, truncated_records
            if not matches(member, wanted):
                return
            deepest = max(deepest, sum(1 for _ in self._fleet.path(member)))
            facts = self._facts(member, names)
            truncated_records += facts.truncated_records
            keys = [("level", member.level), *member.labels.items()]
            if member.region:
                keys.append(("region", member.region.partition("/")[0]))
            for key in keys:
                counts = counted.get(key)
                if counts is None:
                    if len(counted) >= MOST_COUNTED:
                        continue
                    counts = counted[key] = Counts()
                counts.nodes += 1
                for state in facts.states:
                    setattr(counts, state, getattr(counts, state) + 1)
            if facts.states:
                worst.append((facts.badness, member))
                if len(worst) > 50 * WORST:
                    worst[:] = nlargest(WORST, worst, key=_badness)

        def done() -> None:
            labels = sorted(key for key in counted if key[0] != "level")
            call.answer(
                TreeSummary(
                    node=self._name,
                    levels={level: counted["level", level] for level in LEVELS if ("level", level) in counted},
                    labels={"=".join(key): counted[key] for key in labels},
                    worst=[self._node(member, names) for _, member in nlargest(WORST, worst, key=_badness)],
                    truncated_records=truncated_records,
                    refused=self._fleet.refused,
                    # Each node on the way knows the ones below it only up to that.
                    evidence_seconds=round(self._evidence() + SILENT_SECONDS * (deepest - 1), 1),
                )
            )

        self._each(list(self._fleet.members.values()), take, done)

    def nodes(self, call: Call) -> None:
        """GET /v1/tree/nodes: a page of all of them, in the order of their uids, behind `after`."""
        wanted, after = labels_of(call.query), call.query.get("after", [""])[0]
        names = self._names()
        found: list[NodeView] = []
        last = [""]

        def take(member: FleetMember) -> bool:
            if not matches(member, wanted):
                return False
            if len(found) == PAGE:
                last[0] = found[-1].uid
                return True
            found.append(self._node(member, names, topics=True))
            return False

        members = [self._fleet.members[uid] for uid in sorted(uid for uid in self._fleet.members if uid > after)]
        self._each(members, take, lambda: call.answer(NodePage(found, last[0])))

    def applied(self, call: Call) -> None:
        """GET /v1/tree/applied: which nodes have a topic up to an offset, and have applied it."""
        query = call.query
        try:
            topic = query["topic"][0]
            wanted_ends = {int(p): int(o) for p, _, o in (text.partition(":") for text in query.get("end", []))}
            if min(wanted_ends, default=0) < 0:
                raise ValueError
        except (KeyError, ValueError):
            call.refuse(Outcome.INVALID, "topic=NAME and end=PARTITION:OFFSET (as often as need be) are expected")
            return
        group, mirrored = query.get("group", [""])[0], "mirrored" in query
        wanted = labels_of(query)
        members = self._fleet.members.values()
        lowest = max((LEVELS.index(one.level) for one in members if matches(one, wanted)), default=-1)
        wanted = {"level": LEVELS[lowest], **wanted}
        nodes = done = 0
        logs = self._logs_of(topic)
        missing: list[MissingNode] = []

        def take(member: FleetMember) -> None:
            nonlocal nodes, done
            if not matches(member, wanted):
                return
            nodes += 1
            why = _lacks(member.report(), topic, wanted_ends, group, mirrored, logs)
            if not why:
                done += 1
                return
            silent = self._fleet.silent_for(member, self._scheduler.now())
            if len(missing) < MOST_MISSING:
                missing.append(MissingNode(member.uid, member.name, why, round(silent, 1)))

        def answer() -> None:
            call.answer(
                Applied(
                    level=wanted["level"] if lowest >= 0 else "",
                    nodes=nodes,
                    done=done,
                    refused=self._fleet.refused,
                    settled=self._settled(),
                    missing=missing,
                )
            )

        self._each(list(self._fleet.members.values()), take, answer)

    # ---- one node ----

    def _node(self, member: FleetMember, names: dict[str, int], *, topics: bool = False) -> NodeView:
        facts, report = self._facts(member, names), member.report()
        parent, decided = self._fleet.members.get(member.parent), self._decided(member.uid)
        above = parent.name if parent is not None else member.parent
        return NodeView(
            uid=member.uid,
            name=member.name,
            level=member.level,
            region=member.region,
            labels=member.labels,
            version=report.version,
            address=member.address,
            parent=self._name if member.parent == self._uid else above,
            managed=member.managed,
            silent_seconds=round(facts.silent, 1),
            lag_seconds=round(facts.lag, 1),
            waiting={" ".join(key): count for key, count in facts.waiting.items()},
            problems=facts.problems,
            skew_seconds=member.skew,
            disk_free_percent=report.disk_free_percent,
            disk_days=report.disk_days,
            truncated_records=report.truncated_records,
            resyncs=report.resyncs,
            left_out=report.left_out,
            states=facts.states,
            pins=decided.pins if decided is not None else msgspec.UNSET,
            draining=decided.draining if decided is not None else msgspec.UNSET,
            topics=report.topics if topics else msgspec.UNSET,
        )

    def _facts(self, member: FleetMember, names: dict[str, int]) -> Facts:
        now, report = self._scheduler.now(), member.report()
        silent, lag = self._fleet.silent_for(member, now), self._fleet.lag(member, now)
        if silent > lag and not all(topic.ends == self._ends_of(topic.name) for topic in report.topics):
            lag = silent  # nothing is known of what it got since
        waiting: dict[tuple[str, str], int] = {}
        dead_letters, refreshing = 0, False
        for topic in report.topics:
            dead_letters += topic.dead_letters
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
        if dead_letters:
            problems.append(f"{dead_letters} dead letters")
        if member.twins(now):
            problems.append("uid_in_use")
        if silent < 0 and names.get(member.name, 0) > 1:
            problems.append("name_in_use")
        if abs(member.skew) >= WRONG_CLOCK_SECONDS:
            problems.append(f"clock {member.skew:+d} s")
        holds = (silent >= 0, lag >= BEHIND_SECONDS, bool(waiting) or refreshing, bool(problems))
        states = [state for state, one in zip(STATES, holds, strict=True) if one]
        return Facts(silent, lag, waiting, problems, states, report.truncated_records)

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

        def some(part: Sequence[FleetMember]) -> bool:
            return any(take(member) for member in part)

        in_slices(self._scheduler, members, SLICE, some, done)


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
            stored = one.stored[partition] if partition < len(one.stored) else -1
            if applied < end <= stored:
                return f"group {one.name} has stored partition {partition}, and applied it up to {max(0, applied)}"
            if applied < end:
                return f"group {one.name} is at {max(0, applied)} of partition {partition}"
    return ""


def labels_of(query: Query) -> dict[str, str]:
    """What `label=NAME=VALUE` asks for, as often as it is there."""
    return dict(text.partition("=")[::2] for text in query.get("label", []))


def _badness(entry: tuple[Badness, FleetMember]) -> Badness:
    return entry[0]
