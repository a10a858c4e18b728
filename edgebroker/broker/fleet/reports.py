"""What this node tells the node above it: about itself, and what has changed below.

    a tick -> a look at all topics, in steps -> the report of this node -> a batch of what changed
           -> POST /v1/tree/reports to the parent

Nothing is sent while nothing changes. What changes after a quiet time goes at once, then every ten seconds, and slower
where there is much of it. A parent that does not know what went before says so (409): then everything is sent again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from edgebroker.broker.core import Core
from edgebroker.broker.delivery.state import Group
from edgebroker.broker.ports import Key
from edgebroker.common import json
from edgebroker.common.names import is_own
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import in_turns
from edgebroker.common.types import DEAD_LETTERS
from edgebroker.network.http.call import HttpCall
from edgebroker.network.http.peers import Peers
from edgebroker.pipe.fleet import Fleet
from edgebroker.pipe.report import (
    MAX_BATCH_BYTES,
    Batch,
    GroupReport,
    Heard,
    NodeState,
    RankedTopics,
    Report,
    ResyncReport,
    TopicReport,
    digest_of_logs,
    within_limit,
)
from edgebroker.pipe.stream import is_shared
from edgebroker.storage.types import DiskState, GroupOffset
from edgebroker.version import __version__

TICK_SECONDS = 2.0
INTERVAL_SECONDS = 10.0
LIMIT_SECONDS = 600.0
# How often news about silent nodes goes up at once, and how long a node that stops waits for its goodbye.
URGENT_SECONDS, LEAVE_SECONDS = 1.0, 1.0
BYTES_PER_SECOND = 256 << 10
# Said again although nothing changed: what an earlier run of this node left behind up the tree is overwritten.
FIRST_AGAIN_SECONDS, AGAIN_SECONDS = 120.0, 1800.0
# How finely the days are told that a disk will last: what is said is reported by everybody on the way to the top.
STEPS = (0, 1, 2, 3, 5, 7, 10, 14, 21, 30, 60, 90, 180, 365)
# Groups of the program itself.
INTERNAL_GROUPS = "__"


class NodeIdentity(NamedTuple):
    """What of a node does not change while it runs."""

    uid: str
    name: str
    region: str
    labels: dict[str, str]
    managed: bool


class ParentLink(NamedTuple):
    """The parent, while this node is connected to it; another `connection` may be to another run of it."""

    uid: str
    address: str
    connection: int


class NodeStatus(NamedTuple):
    """What a report tells of the node as it is now."""

    level: str
    address: str
    candidates: int
    standby: int
    problems: list[str]
    resyncs: list[ResyncReport]


class Reporter:
    """Owned by the loop thread. `parent` tells the parent, None without one; `status` the node as it is."""

    def __init__(
        self,
        core: Core,
        peers: Peers,
        clock: Clock,
        fleet: Fleet,
        identity: NodeIdentity,
        status: Callable[[], NodeStatus],
        parent: Callable[[], ParentLink | None],
    ) -> None:
        self._engine, self._groups, self._metrics = core.engine, core.groups, core.metrics
        self._clock, self._fleet, self._identity = clock, fleet, identity
        self._peers, self._loop = peers, peers.loop
        self._status, self._parent = status, parent
        self._report = Report(
            uid=identity.uid,
            name=identity.name,
            level="root",
            version=__version__,
            boot=os.urandom(8).hex(),
            number=0,
            region=identity.region,
            labels=identity.labels,
            managed=identity.managed,
        )
        self._growth = Growth()
        self._looking = False
        self._told: Report | None = None
        self._to: ParentLink | None = None
        self._session, self._number = "", 0
        self._due = self._again_at = self._urgent_due = 0.0
        self._asking: HttpCall | None = None
        # There is urgent news.
        self._hurry = False

    def start(self) -> None:
        self._loop.call_later(TICK_SECONDS, self._tick)

    def stop(self) -> None:
        if self._asking is not None:
            self._asking.stop()

    # ---- the report ----

    def report(self) -> Report:
        """This node as it is now, with its topics as they were told last; with another number when something is not as
        it was."""
        return self._made(self._report.topics, self._report.left_out)

    def _made(self, topics: list[TopicReport], left_out: int) -> Report:
        moment, above = self._status(), self._parent()
        free, days = self._growth.disk(self._engine.disk(), self._loop.now())
        made = within_limit(
            replace(
                self._report,
                level=moment.level,
                address=moment.address,
                parent=above.uid if above is not None else "",
                candidates=moment.candidates,
                standby=moment.standby,
                topics=topics,
                problems=moment.problems,
                resyncs=moment.resyncs,
                disk_free_percent=free,
                disk_days=days,
                truncated_records=self._metrics.records_truncated,
                left_out=left_out,
            )
        )
        if made != self._report:
            self._report = replace(made, number=self._report.number + 1)
        return self._report

    def _look_at_topics(self, found: RankedTopics) -> Iterator[None]:
        """Find the topics to tell of, in steps: there may be thousands, and groups in all of them."""
        groups: dict[str, dict[str, GroupReport]] = {}
        for group in self._groups.all():
            if group.name.startswith(INTERNAL_GROUPS):
                continue
            for key, committed in list(group.committed_offsets.items()):
                self._note(groups.setdefault(key[0], {}), group, key, committed)
                yield
        for topic in sorted(self._engine.topics()):
            logs = self._engine.partitions(topic)
            if not is_shared(topic) or is_own(topic) or not logs:
                continue
            found.add(
                TopicReport(
                    topic,
                    [one.durable_end for one in logs],
                    [_brief(one) for one in groups.get(topic, {}).values() if len(one.applied) == len(logs)],
                    self._dead_letters(topic),
                    digest_of_logs([one.identity.log_id for one in logs]),
                )
            )
            yield

    def _note(self, groups: dict[str, GroupReport], group: Group, key: Key, committed: GroupOffset) -> None:
        """What a group has of a partition."""
        logs = self._engine.partitions(key[0])
        if key[1] >= len(logs):
            return
        found = groups.get(group.name)
        if found is None or len(found.applied) != len(logs):
            found = groups[group.name] = GroupReport(group.name, [-1] * len(logs), stored=[-1] * len(logs))
        if committed.log_id == logs[key[1]].identity.log_id:
            applied = group.applied_in(logs[key[1]])
            found.stored[key[1]] = committed.next_offset
            found.applied[key[1]] = committed.next_offset if applied < 0 else min(applied, committed.next_offset)
        if committed.refreshing and not found.refreshing:
            groups[group.name] = replace(found, refreshing=True)

    def _dead_letters(self, topic: str) -> int:
        """Dead letters that are neither replayed nor dropped."""
        dead = self._engine.log(topic + DEAD_LETTERS, 0)
        if dead is None:
            return 0
        done = self._groups.find("__dlq")
        committed = done.committed(dead) if done is not None else None
        return dead.durable_end - max(dead.log_start, committed.next_offset if committed is not None else 0)

    # ---- sending ----

    def look_soon(self) -> None:
        """There is news that shall not wait for its turn: it goes up at once, or a second after the last such news."""
        if not self._hurry:
            self._hurry = True
            self._loop.call_later(max(0.0, self._urgent_due - self._loop.now()), self._look_now)

    def _look_now(self) -> None:
        if self._asking is not None:
            self._loop.call_later(URGENT_SECONDS, self._look_now)  # behind the batch that is under way
            return
        self._hurry, self._due = False, 0.0
        self._urgent_due = self._loop.now() + URGENT_SECONDS
        self._look()

    def leave(self, done: Callable[[], None]) -> None:
        """Tell the parent that this node stops: done when it was told, or could not be for a second."""
        above = self._parent()
        if above is None or self._session == "":
            done()
            return
        if self._asking is not None:
            self._asking.stop()
        goodbye = Batch(
            sender=self._identity.uid,
            session=os.urandom(8).hex(),
            number=0,
            nodes=[],
            wall_ms=self._clock.wall_ms(),
            leaving=True,
        )
        body = msgspec.json.encode(goodbye)
        self._asking = HttpCall(
            self._peers, above.address, "POST", "/v1/tree/reports", body, lambda *told: done(), limit=LEAVE_SECONDS
        )

    def _tick(self) -> None:
        self._loop.call_later(TICK_SECONDS, self._tick)
        self._look()

    def _look(self) -> None:
        above = self._parent()
        if above is None or self._asking is not None or (above == self._to and self._loop.now() < self._due):
            return
        if not self._looking:
            self._looking = True
            topics = RankedTopics()
            in_turns(self._loop, self._look_at_topics(topics), lambda: self._tell(topics))

    def _tell(self, topics: RankedTopics) -> None:
        self._looking = False
        now, above = self._loop.now(), self._parent()
        if above is None or self._asking is not None:
            return
        greet = above != self._to
        if self._to is None or above.uid != self._to.uid:
            self._new_session()
            self._again_at = now + FIRST_AGAIN_SECONDS
        self._to = above
        report = self._made(topics.best(), topics.left_out)
        if now >= self._again_at:
            self._again_at = now + AGAIN_SECONDS
            report = self._report = replace(report, number=report.number + 1)
        nodes = [] if report == self._told else [NodeState(report=msgspec.Raw(msgspec.json.encode(report)))]
        own = bool(nodes)
        nodes += self._fleet.take_changes(MAX_BATCH_BYTES - len(nodes) * 4096, now)
        if nodes or greet:
            self._send(above, report if own else self._told, nodes)

    def _new_session(self) -> None:
        self._session, self._number, self._told = os.urandom(8).hex(), 0, None
        self._fleet.tell_all()

    def _send(self, above: ParentLink, report: Report | None, nodes: list[NodeState]) -> None:
        body = msgspec.json.encode(
            Batch(
                sender=self._identity.uid,
                session=self._session,
                number=self._number,
                nodes=nodes,
                wall_ms=self._clock.wall_ms(),
            )
        )
        self._metrics.reports_sent += len(nodes)
        more, taken = self._fleet.changed, self._fleet.taken  # more: it was too much for one batch

        def told(status: int, answer: bytes, error: str) -> None:
            self._asking = None
            wait = len(body) / BYTES_PER_SECOND
            if more and not error:
                self._loop.call_later(wait, self._look)
            else:
                wait = max(wait, INTERVAL_SECONDS)
            self._due = self._loop.now() + wait
            if status == 409:
                self._new_session()  # it was restarted, and has forgotten
                self._due = 0.0
            elif error:
                # Whether it arrived is not known: it is told again, in a session of its own.
                self._fleet.put_back(taken)
                self._session, self._number = os.urandom(8).hex(), 0
            else:
                self._told = report
                self._number += 1
                self._forget(answer)

        self._asking = HttpCall(self._peers, above.address, "POST", "/v1/tree/reports", body, told, limit=LIMIT_SECONDS)

    def _forget(self, answer: bytes) -> None:
        """Nodes that this one lost, and that are elsewhere by now."""
        try:
            elsewhere = json.decode(answer, Heard).elsewhere
        except msgspec.DecodeError:
            return
        for uid in elsewhere:
            member = self._fleet.members.get(uid)
            if member is not None and member.silent_since is not None:
                self._fleet.forget(uid)


class Growth:
    """How long the disk will last, from what its use was hour by hour over a day."""

    HOURS = 24

    def __init__(self) -> None:
        self._free: list[tuple[float, int]] = []
        self._percent, self._days = -2, -1

    def disk(self, disk: DiskState | None, now: float) -> tuple[int, int]:
        """(free space in percent, days until it is used up); -1 days when it is not being used up."""
        if disk is None:
            return 100, -1
        free, size = disk.free, disk.size
        if not self._free or now - self._free[-1][0] >= 3600:
            self._free = [*self._free[-self.HOURS :], (now, free)]
            since, before = self._free[0]
            days = -1
            if now - since >= 3600 and before - free > size // 1000:
                days = int(free / ((before - free) / (now - since)) / 86400)
            self._days = max((step for step in STEPS if step <= days), default=min(days, 0))
        percent = free * 100 // size
        if abs(percent - self._percent) >= 2:
            self._percent = percent
        return self._percent, self._days


def _brief(report: GroupReport) -> GroupReport:
    """Most groups have applied what they have stored."""
    return replace(report, stored=[]) if report.stored == report.applied else report
