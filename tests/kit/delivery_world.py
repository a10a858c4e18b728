"""The delivery code of a broker without sockets, threads and real time, for tests/test_delivery_model.py.

Sessions, Groups, Membership, Leases, Delivery, Refreshing, DeadLetters and Publishing are the real ones. Below them are
a scheduler that is turned by hand and an engine in memory with faults; above them wires instead of sockets. A Watcher
is told what happens, in the order in which it happens.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Protocol, cast
from unittest.mock import patch

from edgebroker.broker.access.access import Caller
from edgebroker.broker.access.rights import EVERYTHING, Rights
from edgebroker.broker.admin.offsets import GroupOperations
from edgebroker.broker.core import build_core
from edgebroker.broker.delivery.dead_letters import DeadLetters, Failure
from edgebroker.broker.delivery.groups import Groups
from edgebroker.broker.delivery.leases import LeaseLimits
from edgebroker.broker.delivery.membership import Fresh, Membership
from edgebroker.broker.delivery.push import Push
from edgebroker.broker.delivery.state import TRANSITIONS, Cursor, CursorState, Group
from edgebroker.broker.ports import Key
from edgebroker.broker.publish.publishing import Publishing, PublishLimits
from edgebroker.broker.sessions.native import Session
from edgebroker.common import batch
from edgebroker.common.messages import Wanted
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.records import Record
from edgebroker.common.types import DEAD_LETTERS, TopicSettings
from edgebroker.network.io.receiving import Receiving
from edgebroker.network.io.transport import FileRange
from edgebroker.network.wire import frames
from edgebroker.network.wire.connection import Frame
from edgebroker.network.wire.frames import FrameType
from edgebroker.storage.engine import Log
from edgebroker.storage.log.staging import Stage
from edgebroker.storage.memory import MemoryEngine, MemoryLog
from edgebroker.storage.types import ColdRead, Found, GroupOffset, NeedsDisk, make_identity
from tests.kit.clock import ManualClock, ManualScheduler
from tests.kit.core_listener import CoreListener
from tests.kit.storage import MAX

MOST = {"max_committed_offsets": 100_000, "max_subscribed_partitions": 50_000}
LIMITS = LeaseLimits(timeout=6.0, backoff=0.5, max_backoff=2.0, max_attempts=3)
SWEEP_SECONDS = 1.0
TURN_BYTES = 600
MANY_TURNS = 500


class FaultyLog(MemoryLog):
    """`cold`: its records have to be fetched."""

    cold = False

    def find(self, offset: int, max_bytes: int, max_records: int, hint: tuple[int, int] | None = None) -> Any:
        if self.cold and offset < self.durable_end:
            return NeedsDisk()
        return super().find(offset, max_bytes, max_records, hint)

    def read(self, offset: int, max_bytes: int) -> Found:
        return super().find(offset, max_bytes, 1 << 31)


class FaultyEngine(MemoryEngine):
    """Answers later, refuses to publish and to create topics, and cannot be read, as it is told to."""

    def __init__(self, scheduler: ManualScheduler, clock: ManualClock) -> None:
        super().__init__(scheduler, clock, max_batch=MAX, max_record=MAX, window=20)
        self.refused: tuple[Outcome, str] | None = None
        self.unreadable = False
        self.stores_slowly = False
        self._unstored: list[Callable[[], None]] = []

    def refusal(self, *, spare: bool = False) -> tuple[Outcome, str] | None:
        return self.refused

    def create_topic(self, name: str, settings: TopicSettings, done: Done) -> None:
        if self.refused is not None:
            done(*self.refused)
        elif name in self._topics:
            done(Outcome.NAME_CLASH, f"topic {name} exists")
        else:
            self._topics[name] = [
                FaultyLog(name, number, make_identity(self.node_uid, settings), Stage(0, 1, MAX, MAX, 20))
                for number in range(settings.partitions)
            ]
            done(Outcome.OK, "")

    def read_cold(self, log: Log, offset: int, max_bytes: int, done: Callable[[ColdRead], None]) -> None:
        assert isinstance(log, FaultyLog)
        result = ColdRead(error="the disk does not answer", timed_out=True)
        if not self.unreadable:
            found: Any = log.read(offset, max_bytes)
            result = ColdRead(data=bytes(found.data), first_offset=found.first_offset, next_offset=found.next_offset)
        self._scheduler.call_soon_threadsafe(lambda: done(result))

    def when_stored(self, callback: Callable[[], None]) -> None:
        self._unstored.append(callback)
        if not self.stores_slowly:
            self.store()

    def store(self) -> None:
        """What was committed is durable from the next turn on."""
        waiting, self._unstored = self._unstored, []
        for callback in waiting:
            self._scheduler.call_soon_threadsafe(callback)

    def killed(self) -> None:
        self._unstored.clear()


class Watcher(Protocol):
    """Who is told, each time before the broker acts on it."""

    def subscribed(
        self, member: Member, group: Group, wanted: list[Wanted], correlation: int, windows: tuple[int, int]
    ) -> None: ...
    def vanished(self, member: Member) -> None: ...
    def timed_out(self, cursor: Cursor) -> None: ...
    def rebalancing(self, group: Group) -> None: ...
    def rebalanced(self) -> None: ...
    def granted(self, cursor: Cursor) -> None: ...
    def freed(self, cursor: Cursor) -> None: ...
    def put(self, group: Group, log: Log, committed: GroupOffset) -> None: ...
    def dead_letter_begun(self, log: Log, offset: int, failure: Failure) -> None: ...
    def dead_letter_written(self, log: Log, offset: int, failure: Failure, outcome: Outcome) -> None: ...
    def sent(self, member: Member, head: bytes, data: bytes) -> None: ...


class Wire:
    """A member's transport. It may be full: what is sent waits. It breaks at the send that `fuse` counts down to."""

    peer = "127.0.0.1:1"

    def __init__(self, member: Member) -> None:
        self._member = member
        self.backlog = 0
        self.closed = self.full = False
        self.fuse = 0

    def send(self, data: bytes | memoryview) -> None:
        self.send_pair(bytes(data), memoryview(b""))

    def send_pair(self, head: bytes, data: memoryview) -> None:
        if self.closed:
            return
        self._member.world.watcher.sent(self._member, bytes(head), bytes(data))
        self._member.arrived.append((bytes(head), bytes(data)))
        if self.fuse:
            self.fuse -= 1
            if not self.fuse:
                self.close("the peer is gone")
                return
        if self.full:
            self.backlog += len(head) + len(data)

    def send_file(self, head: bytes, extent: FileRange) -> None:
        raise AssertionError("there are no files")

    def close(self, reason: str) -> None:
        if not self.closed:
            self.closed = True
            self._member.world.watcher.vanished(self._member)
            self._member.on_closed(reason)

    def close_when_drained(self, reason: str) -> None:
        self.close(reason)

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class Member(Session):
    """A session whose client is the test. `arrived`: frames the client has not looked at."""

    def __init__(self, world: World, client_id: str) -> None:
        self.world = world
        self.arrived: list[tuple[bytes, bytes]] = []
        self._correlations = itertools.count(1)
        self._host, self._core = cast("Any", world), world.core
        self._deferred, self._holds, self._in_turn, self._drain_first = None, 0, False, False
        self.client_id, self.group, self.opened_at = client_id, None, 0.0
        self.cursors, self.waits_for, self.producer_id = {}, [], -1
        self.expects_topics, self.share, self.caller = False, None, Caller(client_id, Rights(EVERYTHING, []))
        self._core.producers.arrived(client_id)
        self.wire = Wire(self)
        self.transport = cast("Any", self.wire)

    def __repr__(self) -> str:
        return f"<{self.client_id} {id(self) & 0xFFFF:04x}>"

    def next_correlation(self) -> int:
        return next(self._correlations)

    def client_says(self, data: bytes) -> None:
        """A frame from the client."""
        _, kind, _, _, correlation = frames.HEADER.unpack_from(data)
        self._handle(Frame(FrameType(kind), correlation, memoryview(data)[frames.HEADER_BYTES :]))

    def looked(self) -> list[tuple[bytes, bytes]]:
        """What the client gets to see now."""
        if self.wire.backlog:
            return []
        seen, self.arrived = self.arrived, []
        return seen


class _Groups(Groups):
    watcher: Watcher

    def put(self, group: Group, log: Log, committed: GroupOffset) -> None:
        self.watcher.put(group, log, committed)
        super().put(group, log, committed)

    def grant(self, cursor: Cursor) -> None:
        self.watcher.granted(cursor)
        super().grant(cursor)

    def revoke(self, cursor: Cursor) -> None:
        self.watcher.freed(cursor)
        super().revoke(cursor)


class _Membership(Membership):
    watcher: Watcher

    def subscribe(
        self, member: Any, group: Group, wanted: list[Wanted], correlation: int, windows: tuple[int, int]
    ) -> None:
        self.watcher.subscribed(member, group, wanted, correlation, windows)
        super().subscribe(member, group, wanted, correlation, windows)

    def timed_out(self, cursor: Cursor) -> None:
        self.watcher.timed_out(cursor)
        super().timed_out(cursor)

    def rebalance(self) -> None:
        super().rebalance()
        if not self._steps:
            self.watcher.rebalanced()

    def _rebalance_group(self, group: Group, fresh: Fresh) -> Iterator[None]:
        self.watcher.rebalancing(group)
        yield from super()._rebalance_group(group, fresh)


class _Push(Push):
    """Only what the table of transitions allows happens to a cursor."""

    def _set(self, cursor: Cursor, state: CursorState, why: str = "") -> None:
        assert state in TRANSITIONS[cursor.state], (cursor.state, state, why)
        super()._set(cursor, state, why)

    def end_iteration(self) -> None:
        super().end_iteration()
        self._turn_bytes = TURN_BYTES


class _DeadLetters(DeadLetters):
    watcher: Watcher

    def write(self, source: Log, offset: int, failure: Failure, done: Done) -> None:
        def told(outcome: Outcome, message: str) -> None:
            self.watcher.dead_letter_written(source, offset, failure, outcome)
            done(outcome, message)

        self.watcher.dead_letter_begun(source, offset, failure)
        super().write(source, offset, failure, told)


class _Publishing(Publishing):
    """What the checker thread would do happens at once; it is told in the next turn."""

    def check(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        work()
        self._scheduler.call_soon_threadsafe(done)


class World(CoreListener):
    """What a Broker is, for its sessions and its engine."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.loop = ManualScheduler(self.clock)
        self.engine = FaultyEngine(self.loop, self.clock)
        self.limits = SimpleNamespace(consume_records=50, consume_bytes=1 << 20, max_groups=1000, **MOST)
        self.receiving = Receiving(self.loop, 1 << 20)
        # Everybody may do everything.
        free = SimpleNamespace(refusal=lambda name, what, more: "", of=lambda name: None)
        self.access = SimpleNamespace(missing=lambda *asked: "", tenants=free)
        self.members: list[Member] = []
        self.letters: list[Record] = []
        self.settled = True

    def wanted_from(self, peer: str, more: int) -> int:
        return 0  # of this machine

    def start(self, watcher: Watcher) -> None:
        """Begin, or begin again with what the engine has stored."""
        self.watcher = watcher
        self.loop.reset()
        self.engine.killed()
        self.members.clear()
        limits = PublishLimits(1 << 30, 1 << 29, MAX, MAX, 1000, True, False, 5.0, TopicSettings())
        watched = {"Groups": _Groups, "Membership": _Membership, "DeadLetters": _DeadLetters}
        with patch.multiple("edgebroker.broker.core", Publishing=_Publishing, Push=_Push, **watched):
            self.core = build_core(self.engine, self.loop, self.clock, limits, LIMITS)
        self.groups, self.membership = self.core.groups, self.core.membership
        self.operations = GroupOperations(self.core)
        for one in (self.groups, self.membership, self.core.leases._dead_letters):
            one.watcher = watcher  # type: ignore[attr-defined]
        self.engine.open(self)
        for (group, topic, partition), offset in self.engine.group_offsets().items():
            self.groups.restore(group, topic, partition, offset, self.loop.now())
        self.loop.at_end_of_iteration(self.membership.rebalance)
        self.loop.at_end_of_iteration(self.core.push.end_iteration)
        self._sweep()

    def _sweep(self) -> None:
        self.loop.call_later(SWEEP_SECONDS, self._sweep)
        for cursor in self.core.push.overdue(self.loop.now()):
            self.membership.timed_out(cursor)

    def connect(self, client_id: str) -> Member:
        member = Member(self, client_id)
        self.members.append(member)
        return member

    def closed(self, session: Session, reason: str) -> None:
        self.members.remove(cast("Member", session))

    def settle(self) -> None:
        """Turn until there is nothing to do at this moment."""
        for _ in range(MANY_TURNS):
            self.loop.turn()
            if self.loop.due() > self.loop.now():
                self.settled = True
                return
        raise AssertionError("it never comes to rest")

    def advance(self, seconds: float) -> None:
        """Let time pass; whatever is due meanwhile happens when it is due."""
        end = self.clock.seconds + seconds
        self.settle()
        while self.loop.due() <= end:
            self.clock.advance(self.loop.due() - self.clock.seconds)
            self.settle()
        self.clock.advance(end - self.clock.seconds)

    def log(self, key: Key) -> FaultyLog:
        log = self.engine.log(*key)
        assert isinstance(log, FaultyLog)
        return log

    # ---- the engine's listener ----

    def on_durable(self, log: Log, chunks: Sequence[Any]) -> None:
        if log.topic.endswith(DEAD_LETTERS):
            self.letters += [record for chunk in chunks for record in batch.decode(chunk, log.topic, log.partition)]
        super().on_durable(log, chunks)

    def retention_floor(self, log: Log) -> int | None:
        return min((offset for _, offset, _ in self.groups.places(log, self.loop.now())), default=None)

    def on_full(self) -> bool:
        return False
