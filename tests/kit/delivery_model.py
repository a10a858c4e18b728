"""What delivery has to do, slow and obvious: groups, leases and attempts, for tests/test_delivery_model.py.

The model is told what clients and operators do, and of every frame that a member is sent. It says what has to follow,
and fails at the first frame, commit, grant or dead letter that must not be.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from edgebroker.broker.delivery.dead_letters import HEADERS, Failure
from edgebroker.broker.delivery.state import Cursor, Group
from edgebroker.broker.ports import Key
from edgebroker.common import batch
from edgebroker.common.errors import Code
from edgebroker.common.messages import NO_LOG_ID, AckKind, ConsumerAck, Holding, Wanted
from edgebroker.common.outcome import Outcome
from edgebroker.common.types import DEAD_LETTERS, Start
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import Answer, Assigned, Deliver, FrameType, Ready, Reset
from edgebroker.storage.engine import Log
from edgebroker.storage.types import GroupOffset
from tests.kit.delivery_world import LIMITS, Member, World

TOLD = {Code.BEHIND, Code.NO_SNAPSHOT, Code.DISK_FULL, Code.STORAGE_TIMEOUT}
STATES = {
    "": {"live", "behind", "reading"},
    "backoff": {"backoff"},
    "letter": {"dead_lettering"},
    "refresh": {"refresh"},
    "no_snapshot": {"no_snapshot"},
}


@dataclass(eq=False)
class Refresh:
    """`reset_id` is known once it was announced."""

    start: int
    target: int
    reset_id: bytes | None = None
    over: bool = False


@dataclass(eq=False)
class Spot:
    """One partition of one group. `waits` says why its holder has no lease. `failed_at` failed and comes alone, behind
    it the window opens bit by bit; `suspect`: its failure was silent (as far as is known): alone for its member."""

    key: Key
    log: Log
    group: GroupModel
    committed: int | None = None
    attempts: int = 0
    isolated: bool = False
    reason: str = "it failed in an earlier run"
    silent: bool = True
    pause: tuple[int, float] = (-1, 0.0)
    rejected: int = -1
    dead_lettering: int | None = None
    retry_at: float = 0.0
    refresh: Refresh | None = None
    announced: bool = True
    last_client: str | None = None
    moved_end: int = -1
    # what concerns its holder
    holder: Member | None = None
    generation: int = -1
    lease: int | None = None
    waits: str = ""
    acked: int = 0
    next: int = 0
    failed_at: int = -1
    suspect: bool = False
    revoking: bool = False
    deadline: float = 0.0
    window: tuple[int, int] = (0, 0)
    pieces: list[tuple[int, int]] = field(default_factory=list)
    epoch: int = -1
    correlation: int = 0
    giving_back: str = ""
    tell: Member | None = None

    @property
    def in_flight(self) -> int:
        return self.next - self.acked

    @property
    def bytes_in_flight(self) -> int:
        return sum(size for _, size in self.pieces)

    @property
    def room(self) -> int:
        """Records that may be in flight."""
        return self.window[0] if self.failed_at < 0 else min(self.window[0], 1 + self.acked - self.failed_at)

    @property
    def single(self) -> bool:
        return self.acked == self.failed_at

    @property
    def quiets(self) -> bool:
        """The other partitions of its holder wait for it."""
        ready = self.lease is not None and not self.revoking and not self.behind and self.next < self.log.durable_end
        return self.suspect and self.single and (ready or self.in_flight > 0)

    @property
    def refreshing(self) -> bool:
        return self.refresh is not None and not self.refresh.over

    @property
    def behind(self) -> bool:
        return self.next > self.log.durable_end or self.epoch > self.log.epoch

    def stand(self, offset: int, waits: str = "") -> None:
        """Nothing is in flight, there is no lease."""
        self.lease, self.waits, self.acked, self.next, self.deadline = None, waits, offset, offset, 0.0
        self.pieces.clear()

    def commit(self, committed: int, attempts: int = 0, isolated: bool = False) -> None:
        self.committed, self.attempts, self.isolated = committed, attempts, isolated


@dataclass(eq=False)
class Entry:
    """What a member said it wants; `fresh`: in this turn, and where the log ended then."""

    topics: dict[str, Wanted] = field(default_factory=dict)
    pins: dict[Key, Wanted] = field(default_factory=dict)
    left: set[Key] = field(default_factory=set)
    said: dict[Key, Wanted] = field(default_factory=dict)
    fresh: dict[Key, int] = field(default_factory=dict)
    window: tuple[int, int] = (0, 0)
    correlation: int = 0
    unresponsive: bool = False

    def wants(self, key: Key) -> bool:
        return key in self.pins or (key[0] in self.topics and key not in self.left)


class GroupModel:
    def __init__(self, name: str) -> None:
        self.name = name
        self.entries: dict[Member, Entry] = {}
        self.spots: dict[Key, Spot] = {}
        self.generations: set[int] = set()
        self.held_before: set[Key] = set()
        self.rebalances = 0

    def eligible(self, key: Key) -> list[Member]:
        """Who may get a partition: who wants it and does not hang; if all hang, all who want it."""
        wanting = {member: entry for member, entry in self.entries.items() if entry.wants(key)}
        return [member for member, entry in wanting.items() if not entry.unresponsive] or list(wanting)


class Model:
    """Implements delivery_world.Watcher."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.records: dict[Key, list[bytes]] = {}
        self.groups: dict[str, GroupModel] = {}
        self.private: dict[Group, GroupModel] = {}
        self.leases: set[int] = set()
        self.reset_ids: set[bytes] = set()
        self.expected: dict[tuple[Member, int], Code] = {}
        self.readable_from = 0.0
        self.letters_begun: list[tuple[str, Key, int]] = []

    @property
    def now(self) -> float:
        return self.world.loop.now()

    def group(self, group: Group) -> GroupModel:
        if group.name:
            return self.groups.setdefault(group.name, GroupModel(group.name))
        return self.private.setdefault(group, GroupModel(""))

    def group_of(self, member: Member) -> GroupModel:
        assert member.group is not None
        return self.group(member.group)

    def spot(self, group: GroupModel, key: Key) -> Spot:
        if key not in group.spots:
            group.spots[key] = Spot(key, self.world.log(key), group)
        return group.spots[key]

    def spots(self) -> Iterator[Spot]:
        for group in (*self.groups.values(), *self.private.values()):
            yield from group.spots.values()

    def held(self, member: Member) -> list[Spot]:
        return [spot for spot in self.group_of(member).spots.values() if spot.holder is member]

    def keys(self, line: Wanted) -> list[Key]:
        if line.partition >= 0:
            return [(line.topic, line.partition)]
        return [(line.topic, log.partition) for log in self.world.engine.partitions(line.topic)]

    # ---- membership ----

    def subscribed(
        self, member: Member, group: Group, wanted: list[Wanted], correlation: int, windows: tuple[int, int]
    ) -> None:
        assert not member.wire.closed, "who is gone does not join"
        entry = self.group(group).entries.setdefault(member, Entry())
        entry.unresponsive, entry.correlation = False, correlation
        entry.window = windows
        named: dict[Key, None] = {}
        for line in wanted:
            keys = self.keys(line)
            if line.partition < 0:
                entry.topics[line.topic] = line
                entry.left -= set(keys)
                entry.pins = {key: pin for key, pin in entry.pins.items() if key[0] != line.topic}
            else:
                entry.pins[keys[0]] = line
            for key in keys:
                entry.said[key] = line
            named.update(dict.fromkeys(keys))
        free = [key for key in named if self.spot(self.group(group), key).holder is None]
        entry.fresh.update((key, self.world.log(key).durable_end) for key in free)
        for key in named:
            spot = self.spot(self.group(group), key)
            if spot.holder is member:
                spot.correlation, spot.window, spot.revoking = correlation, entry.window, False
                self.begin(spot, entry.said.pop(key), fresh=True)

    def left(self, member: Member, lines: list[Wanted]) -> None:
        group = self.group_of(member)
        entry = group.entries.get(member)
        if entry is None:
            return
        for line in lines:
            if line.partition < 0:
                entry.topics.pop(line.topic, None)
            else:
                entry.left.add((line.topic, line.partition))
            for key in self.keys(line):
                entry.pins.pop(key, None)
                if self.spot(group, key).holder is member:
                    self.spot(group, key).giving_back = "quietly"
        if not entry.topics and not entry.pins:
            del group.entries[member]

    def released(self, member: Member, lines: list[Wanted]) -> None:
        for line in lines:
            spot = self.spot(self.group_of(member), (line.topic, line.partition))
            if spot.holder is member and spot.revoking:
                spot.giving_back = "told"

    def vanished(self, member: Member) -> None:
        self.expected = {asked: code for asked, code in self.expected.items() if asked[0] is not member}
        if member.group is None:
            return
        self.group_of(member).entries.pop(member, None)
        for spot in self.held(member):
            if spot.in_flight:
                self.fail(spot, "the consumer disconnected", counts=spot.single, pause=False)
            spot.giving_back = "quietly"

    def timed_out(self, cursor: Cursor) -> None:
        spot = self.spot(self.group(cursor.group), cursor.key)
        if cursor.state == "gone":
            return  # its member broke while it was told about another partition
        assert spot.holder is cursor.member, "what nobody holds is not overdue"
        assert spot.in_flight and self.now >= spot.deadline, "it is not overdue"
        self.fail(spot, "not acknowledged in time", counts=spot.single)
        spot.group.entries[spot.holder].unresponsive = True
        if spot.revoking or spot.holder not in spot.group.eligible(spot.key):
            spot.giving_back = "told"
        else:
            self.resume(spot, spot.acked)

    def rebalancing(self, group: Group) -> None:
        found = self.group(group)
        found.held_before |= {spot.key for spot in found.spots.values() if spot.holder is not None}
        found.rebalances += 1
        if found.rebalances > 1:
            for entry in found.entries.values():  # somebody vanished while it was told what it got
                entry.fresh.clear()

    def rebalanced(self) -> None:
        for group in (*self.groups.values(), *self.private.values()):
            group.held_before.clear()
            group.rebalances = 0
            for entry in group.entries.values():
                entry.fresh.clear()

    def granted(self, cursor: Cursor) -> None:
        group, member = self.group(cursor.group), cursor.member
        assert isinstance(member, Member)
        spot = self.spot(group, cursor.key)
        assert spot.holder is None, f"{spot.key} has a holder: {spot.holder}"
        assert member in group.eligible(spot.key), "it goes to who wants it"
        entry = group.entries[member]
        fresh = spot.key in entry.fresh and spot.key not in group.held_before
        group.held_before.add(spot.key)
        spot.holder, spot.revoking, spot.generation = member, False, -1
        spot.window, spot.correlation = entry.window, entry.correlation
        line = entry.said.pop(spot.key, None)
        spot.stand(0)  # what the holder before had acknowledged is nothing to this one
        self.begin(spot, line, fresh=fresh, latest=entry.fresh.get(spot.key, -1))
        spot.last_client = member.client_id

    def freed(self, cursor: Cursor) -> None:
        spot = self.spot(self.group(cursor.group), cursor.key)
        assert spot.holder is cursor.member, "it was not held"
        assert spot.giving_back or (spot.revoking and not spot.in_flight), "taken away with records in flight"
        if spot.giving_back != "quietly":
            spot.tell = spot.holder
        spot.giving_back = ""
        spot.holder, spot.announced, spot.suspect = None, True, False
        spot.stand(spot.acked)

    # ---- leases ----

    def begin(self, spot: Spot, line: Wanted | None, *, fresh: bool, latest: int = -1) -> None:
        """A holder begins, where its line says if that counts; `latest`: where the log ended when it was said, if that
        was not now."""
        assert spot.holder is not None
        own = spot.last_client == spot.holder.client_id
        start = line.start if line is not None else Start.COMMITTED
        if start is Start.RESUME:
            counts = (own or spot.last_client is None) and (spot.committed or 0) >= spot.moved_end
        else:
            counts = fresh or (own and start is Start.POSITION)
        spot.epoch = -1
        if spot.refreshing:
            assert spot.committed is not None
            spot.stand(spot.committed, "refresh")
            spot.announced = False
            return
        offset = spot.committed or 0
        if line is not None and counts:
            end = spot.log.durable_end
            if start is Start.POSITION:
                foreign = line.log_id not in (NO_LOG_ID, spot.log.identity.log_id_bytes)
                if foreign or (line.epoch == 0 and line.value > 0):
                    if self.refresh(spot) is Code.NO_SNAPSHOT:
                        spot.stand(spot.acked, "no_snapshot")
                    return
                offset, spot.epoch = line.value, line.epoch
            elif start is Start.RESUME:
                same = line.log_id == spot.log.identity.log_id_bytes and 0 < line.epoch <= spot.log.epoch
                offset = max(offset, line.value) if same and line.value <= end else offset
            elif start is not Start.COMMITTED:
                latest = end if latest < 0 else min(latest, end)
                offset = {Start.OFFSET: line.value, Start.TIME: min(line.value, end), Start.LATEST: latest}.get(
                    start, 0
                )
        self.resume(spot, offset)

    def resume(self, spot: Spot, offset: int) -> None:
        """The holder goes on at an offset: now, behind a pause, or behind a dead letter."""
        spot.stand(offset)
        spot.failed_at = -1
        if spot.committed != offset:
            spot.suspect = False
            if not spot.behind:
                spot.commit(offset)
                spot.pause, spot.rejected = (-1, 0.0), -1
            return
        spot.suspect = spot.isolated and spot.silent
        if spot.isolated:
            spot.failed_at = offset
        if spot.dead_lettering is not None or spot.attempts >= LIMITS.max_attempts or spot.rejected == offset:
            spot.waits, spot.retry_at = "letter", self.now
        elif spot.pause[0] == offset and spot.pause[1] > self.now:
            spot.waits = "backoff"

    def fail(self, spot: Spot, reason: str, *, counts: bool, silent: bool = True, pause: bool = True) -> None:
        known = spot.attempts if spot.committed == spot.acked else 0
        spot.commit(spot.acked, known + counts, isolated=True)
        spot.reason, spot.silent = reason, silent
        if pause or spot.attempts:
            seconds = min(LIMITS.max_backoff, LIMITS.backoff * 2 ** max(0, spot.attempts - 1))
            spot.pause = (spot.acked, self.now + seconds)
        spot.stand(spot.acked, "backoff")

    def acknowledged(self, member: Member, ack: ConsumerAck) -> Code:
        """What has to be the answer."""
        if member.group is None:
            return Code.STALE
        group = self.group_of(member)
        entry, spot = group.entries.get(member), self.spot(group, (ack.topic, ack.partition))
        if entry is not None:
            entry.unresponsive = False
        lease = (spot.generation, spot.lease)
        if spot.holder is not member or lease != (ack.generation, ack.lease):
            return Code.STALE
        if ack.kind is AckKind.IN_PROGRESS:
            spot.deadline = self.now + LIMITS.timeout if spot.in_flight else 0.0
            return Code.OK
        negative = ack.kind in (AckKind.NEGATIVE, AckKind.REJECT)
        if not spot.acked <= ack.offset <= spot.next - negative:
            return Code.STALE
        came_late = not spot.behind and spot.committed is not None and spot.committed < spot.acked
        if ack.offset > spot.acked or came_late:
            spot.acked, spot.suspect = ack.offset, False
            if spot.room == spot.window[0]:
                spot.failed_at = -1
            spot.commit(ack.offset)
            spot.pieces = [piece for piece in spot.pieces if piece[0] > ack.offset]
        spot.deadline = self.now + LIMITS.timeout if spot.in_flight else 0.0
        if negative:
            self.fail(spot, ack.reason or "the handler failed", counts=True, silent=False)
            spot.rejected = spot.acked if ack.kind is AckKind.REJECT else spot.rejected
            if not spot.revoking:
                self.resume(spot, spot.acked)
        return Code.OK

    def moved(self, spot: Spot, offset: int) -> None:
        spot.commit(offset)
        spot.pause, spot.last_client, spot.moved_end, spot.rejected = (-1, 0.0), "", spot.log.durable_end, -1
        if spot.holder is not None:
            spot.epoch = -1
            self.resume(spot, offset)

    # ---- dead letters ----

    def dead_letter_begun(self, log: Log, offset: int, failure: Failure) -> None:
        key = (log.topic, log.partition)
        said = (failure.group, failure.attempts, failure.reason)
        due = [
            spot
            for spot in self.spots()
            if (spot.key, spot.waits, spot.committed, spot.dead_lettering) == (key, "letter", offset, None)
            and (spot.group.name or "-", spot.attempts, spot.reason) == said
        ]
        assert due, f"record {offset} of {log.name} must not become a dead letter: {failure}"
        due[0].dead_lettering = offset
        self.letters_begun.append((failure.group, key, offset))

    def dead_letter_written(self, log: Log, offset: int, failure: Failure, outcome: Outcome) -> None:
        name = "" if failure.group == "-" else failure.group
        key = (log.topic, log.partition)
        spot = next(s for s in self.spots() if (s.group.name, s.key, s.dead_lettering) == (name, key, offset))
        spot.dead_lettering = None
        waits = spot.waits == "letter"
        if spot.committed != offset:
            if waits:
                self.begin(spot, None, fresh=False)
        elif outcome is Outcome.OK:
            self.must_be_in_dead_letters(log, offset, failure)
            spot.commit(offset + 1)
            spot.reason = "it failed in an earlier run"
            if waits:
                self.resume(spot, offset + 1)
        elif waits:
            spot.retry_at = self.now + 1.0

    def must_be_in_dead_letters(self, log: Log, offset: int, failure: Failure) -> None:
        said = (log.topic, log.partition, offset, failure.group, failure.attempts, failure.reason)
        wanted = [(name, str(value).encode()) for name, value in zip(HEADERS, said, strict=False)]
        value = self.records[log.topic, log.partition][offset]
        assert any(
            letter.topic == log.topic + DEAD_LETTERS
            and letter.value == value
            and list(letter.headers)[: len(wanted)] == wanted
            for letter in self.world.letters
        ), f"record {offset} of {log.name} is in no durable letter"

    # ---- refreshes ----

    def refresh(self, spot: Spot) -> Code:
        if spot.refreshing:
            return Code.OK
        start = 0
        if spot.log.settings.kind == "table":
            first = spot.log.identity.snapshot[0]
            start = max(0, first)
            if any(corrupt.next > start for corrupt in spot.log.corrupt_ranges):
                return Code.NO_SNAPSHOT
        spot.commit(start)
        spot.pause, spot.moved_end, spot.rejected = (-1, 0.0), -1, -1
        spot.refresh = Refresh(start, spot.log.durable_end)
        if spot.holder is not None:
            spot.stand(start, "refresh")
            spot.announced = False
        return Code.OK

    def accepted(self, member: Member, spot: Spot, reset_id: bytes, offset: int) -> Code:
        if spot.holder is not member:
            return Code.STALE
        refresh = spot.refresh
        if refresh is None or refresh.over or refresh.reset_id != reset_id:
            return Code.FENCED
        spot.epoch, spot.announced = -1, True
        self.resume(spot, max(offset, refresh.start))
        return Code.OK

    def ready(self, member: Member, spot: Spot, ready: Ready) -> Code:
        if spot.holder is not member:
            return Code.STALE
        refresh = spot.refresh
        if refresh is None or refresh.reset_id != ready.reset_id:
            return Code.FENCED
        if not refresh.over and (ready.next_offset < refresh.target or spot.waits == "refresh"):
            return Code.BEHIND
        refresh.over = True
        return Code.OK

    # ---- what members are sent ----

    def sent(self, member: Member, head: bytes, data: bytes) -> None:
        _, kind, _, _, correlation = frames.HEADER.unpack_from(head)
        body = memoryview(head)[frames.HEADER_BYTES :]
        if kind == FrameType.DELIVER:
            self._deliver(member, frames.read_deliver(body), data)
        elif kind == FrameType.SUBSCRIBE:
            self._notice(member, frames.read_assigned(body))
        elif kind == FrameType.RESET:
            self._reset(member, correlation, frames.read_reset(body))
        elif kind == FrameType.READY:
            assert self.expected.pop((member, correlation)) == Code.OK
        else:
            answer = frames.read_ack(body)
            assert isinstance(answer, Answer)
            expected = self.expected.pop((member, correlation), None)
            if expected is None:
                assert answer.code in TOLD and correlation, answer
            else:
                assert answer.code == expected, (answer, expected)

    def _deliver(self, member: Member, deliver: Deliver, data: bytes) -> None:
        spot = self.spot(self.group_of(member), (deliver.topic, deliver.partition))
        identity = spot.log.identity
        assert spot.holder is member, "delivered to who does not hold it"
        assert not member.wire.backlog, "delivered into a full socket"
        assert spot.lease is not None, f"delivered without a lease ({spot.waits})"
        assert (deliver.generation, deliver.lease) == (spot.generation, spot.lease)
        assert not spot.revoking, "delivered while it is being revoked"
        assert (deliver.log_id, deliver.epoch, deliver.gaps) == (identity.log_id_bytes, spot.log.epoch, [])
        assert deliver.durable_end == spot.log.durable_end == len(self.records[spot.key])
        assert spot.next == deliver.first <= deliver.last < deliver.durable_end, "dense and in order"
        assert deliver.last + 1 - spot.acked <= spot.room, "delivered outside the window"
        fits = spot.bytes_in_flight + len(data) <= spot.window[1]
        assert fits or not spot.in_flight, "more bytes than the window has"
        assert not self.held_back(spot), "delivered beside a record at which a member fell silent"
        found = batch.decode(data, *spot.key, deliver.first, deliver.last)
        wanted = self.records[spot.key][deliver.first : deliver.last + 1]
        assert [record.value for record in found] == wanted
        if not spot.in_flight:
            spot.deadline = self.now + LIMITS.timeout
        spot.next = deliver.last + 1
        spot.pieces.append((spot.next, len(data)))

    def held_back(self, spot: Spot) -> bool:
        """A record at which a member fell silent comes when nothing else is in flight to its member; nothing else
        comes then."""
        assert spot.holder is not None
        others = [other for other in self.held(spot.holder) if other is not spot]
        if spot.suspect and spot.single:
            return any(other.in_flight for other in others)
        return any(other.quiets for other in others)

    def _notice(self, member: Member, assigned: Assigned) -> None:
        (line,) = assigned.lines
        group = self.group_of(member)
        spot = self.spot(group, (line.topic, line.partition))
        assert assigned.group == group.name
        if line.holding is Holding.REVOKED:
            assert spot.tell is member, "nothing was taken from it"
            spot.tell = None
            return
        assert spot.holder is member, "it does not hold that"
        assert not spot.revoking, "it is being revoked"
        if line.holding is Holding.REVOKING:
            others = [other for other in group.eligible(spot.key) if other is not member]
            assert others, "nobody else wants it"
            spot.revoking = True
            return
        assert spot.lease is None, "it has a lease already"
        assert spot.waits in ("", "backoff"), spot.waits
        assert spot.waits == "" or self.now >= spot.pause[1], "the pause is not over"
        assert line.lease not in self.leases, "leases are never used twice"
        assert line.offset == spot.acked == spot.next
        assert spot.behind or spot.committed == line.offset
        if spot.generation < 0:
            assert assigned.generation not in group.generations, "each grant has a generation of its own"
            group.generations.add(assigned.generation)
            spot.generation = assigned.generation
        assert assigned.generation == spot.generation
        self.leases.add(line.lease)
        spot.lease, spot.waits = line.lease, ""

    def _reset(self, member: Member, correlation: int, reset: Reset) -> None:
        spot = self.spot(self.group_of(member), (reset.topic, reset.partition))
        refresh = spot.refresh
        assert refresh is not None and not refresh.over
        assert (spot.holder, spot.waits) == (member, "refresh")
        assert correlation == spot.correlation
        assert (reset.from_offset, reset.target) == (refresh.start, refresh.target)
        assert reset.log_id == spot.log.identity.log_id_bytes
        if refresh.reset_id is None:
            assert reset.reset_id not in self.reset_ids
            refresh.reset_id = reset.reset_id
            self.reset_ids.add(reset.reset_id)
        assert reset.reset_id == refresh.reset_id
        spot.announced = True

    # ---- what the broker has stored ----

    def put(self, group: Group, log: Log, committed: GroupOffset) -> None:
        spot = self.spot(self.group(group), (log.topic, log.partition))
        assert committed.next_offset == spot.committed, (
            f"{log.name}: the place moves from {spot.committed} to {committed.next_offset}"
        )

    def restarted(self) -> None:
        """The broker was killed; places are what is left of it."""
        self.private.clear()
        self.expected.clear()
        for name, group in list(self.groups.items()):
            fresh = self.groups[name] = GroupModel(name)
            for key, old in group.spots.items():
                spot = Spot(key, old.log, fresh, old.committed, old.attempts, old.isolated, refresh=old.refresh)
                spot.moved_end = old.moved_end
                fresh.spots[key] = spot

    # ---- what holds whenever nothing is left to do ----

    def check(self) -> None:
        world = self.world
        for name, group in self.groups.items():
            found = world.groups.find(name)
            if found is None:
                assert not group.entries and all(spot.committed is None for spot in group.spots.values())
            else:
                self._check_group(group, found)
        for private, group in self.private.items():
            self._check_group(group, private)
        if not world.engine.stores_slowly:
            assert not self.expected, "what was asked is answered"
        held = {id(cursor) for member in world.members for cursor in member.cursors.values()}
        for cursors in world.core.push._cursors.values():
            assert {id(cursor) for cursor in cursors} <= held, "delivery knows cursors that nobody holds"
        count: Callable[[str, Key, int], int] = lambda *letter: self.letters_begun.count(letter)  # noqa: E731
        for letter in world.letters:
            said = {name: value.decode() for name, value in letter.headers if value is not None}
            about = (said["eb-dlq-group"], (said["eb-dlq-topic"], int(said["eb-dlq-partition"])))
            assert count(*about, int(said["eb-dlq-offset"]))
        assert len(world.letters) <= len(self.letters_begun)

    def _check_group(self, group: GroupModel, real: Group) -> None:
        assert set(group.entries) == set(real.members)
        assert set(real.holders) <= set(group.spots)
        loads = dict.fromkeys(group.entries, 0)
        for key in self.records:
            spot = self.spot(group, key)
            self._check_spot(spot, real)
            if spot.holder is not None:
                loads[spot.holder] += 1
        if any(spot.revoking for spot in group.spots.values()):
            return
        for key in self.records:
            spot, eligible = group.spots[key], group.eligible(key)
            assert (spot.holder in eligible) if eligible else (spot.holder is None), "it is with who wants it"
            if spot.holder is not None and not spot.refreshing and not self.world.engine.stores_slowly:
                least = min(loads[member] for member in eligible)
                assert loads[spot.holder] - least < 2, "the assignment is not balanced"

    def _check_spot(self, spot: Spot, real: Group) -> None:
        committed = real.committed(spot.log)
        if spot.committed is None:
            assert committed is None
        else:
            assert committed is not None
            assert (committed.next_offset, committed.attempts, committed.isolated) == (
                spot.committed,
                spot.attempts,
                spot.isolated,
            )
            assert committed.refreshing == spot.refreshing
            if real.name:
                assert self.world.engine.group_offsets()[real.name, *spot.key] == committed
        assert spot.tell is None or spot.tell.wire.closed, "who lost a partition is told"
        cursor = real.holders.get(spot.key)
        assert (cursor.member if cursor is not None else None) is spot.holder
        if cursor is None or spot.holder is None:
            return
        assert cursor.state in STATES[spot.waits], (cursor.state, spot.waits)
        assert (cursor.in_flight, cursor.deadline) == (spot.in_flight, spot.deadline)
        assert cursor.acked == spot.acked or spot.waits == "refresh"
        assert (cursor.revoking, cursor.in_flight_bytes) == (spot.revoking, spot.bytes_in_flight)
        assert not spot.revoking or spot.in_flight, "what is being revoked is given back once nothing is in flight"
        assert not spot.deadline or self.now < spot.deadline + 1.0, "what is overdue is found within a sweep"
        engine = self.world.engine
        if spot.waits == "backoff":
            assert self.now < spot.pause[1], "the pause is over"
        elif spot.waits == "letter":
            assert self.now < spot.retry_at, "the letter is due"
        elif spot.waits == "refresh":
            assert spot.refreshing, "there is nothing to accept"
            assert spot.announced or engine.stores_slowly, "the refresh was not announced"
        elif spot.waits == "":
            assert (cursor.lease, cursor.generation, cursor.isolated) == (spot.lease, spot.generation, spot.single)
            readable = not engine.unreadable and self.now >= self.readable_from
            able = readable and not spot.holder.wire.backlog and not spot.behind and not self.held_back(spot)
            assert not able or spot.in_flight or spot.next == spot.log.durable_end, "there is something to deliver"
