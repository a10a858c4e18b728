"""Delivery against an obvious model (delivery_model.py), whatever happens in whatever order.

EB_MODEL_EXAMPLES=20000 looks at as many random histories; without it the same hundred are looked at every time.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from edgebroker.broker.admin.offsets import Move, MoveRequest
from edgebroker.broker.delivery import membership, push
from edgebroker.broker.delivery.push import RETRY_SECONDS, TURN_SECONDS
from edgebroker.broker.ports import Key
from edgebroker.common import batch
from edgebroker.common.errors import Code
from edgebroker.common.messages import NO_LOG_ID, AckKind, ConsumerAck, Holding, Wanted
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.scheduler import SLICE_SECONDS
from edgebroker.common.types import AckLevel, Start, TopicSettings
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import FrameType, Intent, Ready, Reset, Subscribe
from edgebroker.storage.types import CorruptRange
from tests.kit.delivery_model import Model, Spot
from tests.kit.delivery_world import Member, World
from tests.kit.storage import pack

TOPICS = {"prices": ("stream", 3), "items": ("table", 2), "orders": ("stream", 1)}
KEYS = [(topic, number) for topic, (_, count) in TOPICS.items() for number in range(count)]
MOST_MEMBERS = 5
FOREIGN = b"\x77" * 16
DRAIN_ROUNDS = 60

CHOICE = st.integers(0, 1 << 16)
OFFSET = st.integers(0, 12)
PARTITION = st.integers(-1, 2)
WHOLE = [("prices", -1), ("prices", -1), ("items", -1), ("orders", -1)]
LINES = st.lists(
    st.tuples(st.sampled_from(KEYS + WHOLE), st.sampled_from(Start), OFFSET),
    min_size=1,
    max_size=3,
)
WINDOW = st.tuples(st.sampled_from([1, 1, 2, 3, 5, 40]), st.sampled_from([1, 150, 400, 1 << 20]))
QUARTERS = st.sampled_from([1, 2, 3, 4, 8, 12, 24, 28])


@dataclass
class View:
    """What a client knows of one partition, from the frames it looked at."""

    generation: int = 0
    lease: int = 0
    acked: int = 0
    next: int = 0
    refresh: Reset | None = None
    before: list[tuple[int, int, int]] = field(default_factory=list)


class DeliveryMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.start()

    def start(self) -> None:
        self.world = World()
        self.model = Model(self.world)
        self.world.start(self.model)
        self.views: dict[Member, dict[Key, View]] = {}
        self.together = 0
        for topic, (kind, partitions) in TOPICS.items():
            wanted = TopicSettings(kind=kind, partitions=partitions)  # type: ignore[arg-type]
            self.world.engine.create_topic(topic, wanted, lambda code, _: None)
        self.model.records = {key: [] for key in KEYS}

    # ---- how things are done ----

    def over(self) -> None:
        """The end of a rule: mostly the broker comes to rest before the next one, sometimes several fall together."""
        self.world.settled = False
        if self.together:
            self.together -= 1
        else:
            self.world.settle()

    def member(self, choice: int) -> Member:
        return self.world.members[choice % len(self.world.members)]

    def spot(self, member: Member, key: Key) -> Spot:
        return self.model.spot(self.model.group_of(member), key)

    def some_key(self, member: Member, choice: int) -> Key:
        """Mostly one that the client knows of."""
        known = sorted(self.look(member))
        return known[choice // 7 % len(known)] if known and choice % 7 else KEYS[choice % len(KEYS)]

    def holding(self, choice: int) -> tuple[Member, Key]:
        """Somebody who has records in flight, if there is anybody, and the partition."""
        found = [(spot.holder, spot.key) for spot in self.model.spots() if spot.holder is not None and spot.in_flight]
        if found and choice % 8:
            return found[choice // 8 % len(found)]
        member = self.member(choice)
        return member, self.some_key(member, choice)

    def look(self, member: Member) -> dict[Key, View]:
        """The client looks at what has arrived."""
        views = self.views.setdefault(member, {})
        for head, _ in member.looked():
            kind, body = head[4], memoryview(head)[frames.HEADER_BYTES :]
            if kind == FrameType.DELIVER:
                deliver = frames.read_deliver(body)
                views[deliver.topic, deliver.partition].next = deliver.last + 1
            elif kind == FrameType.SUBSCRIBE:
                for line in frames.read_assigned(body).lines:
                    view = views.setdefault((line.topic, line.partition), View())
                    if line.holding is Holding.ASSIGNED:
                        view.before.append((view.generation, view.lease, view.next))
                        view.generation, view.lease = frames.read_assigned(body).generation, line.lease
                        view.acked = view.next = line.offset
            elif kind == FrameType.RESET:
                reset = frames.read_reset(body)
                views.setdefault((reset.topic, reset.partition), View()).refresh = reset
        return views

    def ask(self, member: Member, write: Callable[[int], bytes], code: Code | None = None) -> None:
        """Something that is answered, with this code."""
        correlation = member.next_correlation()
        if code is not None:
            self.model.expected[member, correlation] = code
        member.client_says(write(correlation))

    def lines(self, lines: list[tuple[Key, Start, int]], client_choice: int) -> list[Wanted]:
        wanted = []
        for (topic, partition), start, value in lines:
            ids = [NO_LOG_ID, FOREIGN] if client_choice % 5 == 0 and start is Start.POSITION else []
            own = self.world.log((topic, max(0, partition))).identity.log_id_bytes
            log_id = ids[client_choice // 5 % len(ids)] if ids else own
            epoch = (1, 1, 0, 2)[client_choice // 10 % 4] if start in (Start.POSITION, Start.RESUME) else -1
            if start is Start.POSITION and partition < 0:
                log_id = ids[0] if ids else NO_LOG_ID
            wanted.append(Wanted(topic, partition, start, log_id, epoch, value))
        return wanted

    def join(self, member: Member, group: str, window: tuple[int, int], lines: list[Wanted]) -> None:
        # A wire that breaks in the middle is for the rules that concern one partition.
        fuse, member.wire.fuse = member.wire.fuse, int(member.wire.fuse == 1)
        subscribe = Subscribe(Intent.JOIN, group, *window, lines)
        self.ask(member, lambda correlation: frames.write_subscribe(correlation, subscribe), Code.OK)
        if not member.wire.closed:
            member.wire.fuse = fuse

    def acknowledge(self, member: Member, ack: ConsumerAck) -> None:
        before = self.everything()
        code = self.model.acknowledged(member, ack)
        self.ask(member, lambda correlation: frames.write_consumer_ack(correlation, ack), code)
        if code is Code.STALE and not member.wire.closed:
            assert self.everything() == before, "a stale acknowledgement changes nothing"

    def everything(self) -> object:
        """All that the broker knows of its groups (but who hangs)."""
        found: list[object] = [dict(self.world.engine.group_offsets())]
        for group in {id(m.group): m.group for m in self.world.members if m.group is not None}.values():
            found.append(
                (dict(group.committed_offsets), dict(group.pauses), dict(group.reasons), set(group.dead_lettering))
            )
            found.append((group.generation, list(group.members), dict(group.last_clients)))
            for cursor in group.holders.values():
                found.append({name: repr(getattr(cursor, name)) for name in cursor.__slots__})
        return found

    # ---- publishers ----

    @initialize(counts=st.lists(st.integers(0, 6), min_size=len(KEYS), max_size=len(KEYS)), client=st.booleans())
    def begin_with(self, counts: list[int], client: bool) -> None:
        for number, count in enumerate(counts):
            if count:
                self.publish(number, [[count] * (count // 2 + 1), [0]])
        if client:
            self.arrive_for_all("a", (3, 400), Start.COMMITTED)

    @rule(choice=CHOICE, sizes=st.lists(st.lists(st.integers(0, 90), min_size=1, max_size=4), min_size=1, max_size=4))
    def publish(self, choice: int, sizes: list[list[int]]) -> None:
        key = KEYS[choice % len(KEYS)]
        records, batches = self.model.records[key], []
        for batch_sizes in sizes:
            first = len(records)
            values = [b"%d " % (first + number) + b"." * size for number, size in enumerate(batch_sizes)]
            batches.append(batch.encode([(None, value, first + number) for number, value in enumerate(values)]))
            records += values
        data, spans = pack(batches)
        self.world.engine.append(self.world.log(key), data, spans, AckLevel.DURABLE, False, -1)
        # What is not durable is not there; the turn makes it so.
        self.together = 0
        self.over()

    # ---- members ----

    @precondition(lambda self: len(self.world.members) < MOST_MEMBERS)
    @rule(
        group=st.sampled_from(["tills", "tills", "tills", "labels", ""]),
        client=st.sampled_from("abcd"),
        window=WINDOW,
        lines=LINES,
        choice=CHOICE,
    )
    def arrive(
        self, group: str, client: str, window: tuple[int, int], lines: list[tuple[Key, Start, int]], choice: int
    ) -> None:
        self.join(self.world.connect(client), group, window, self.lines(lines, choice))
        self.over()

    @precondition(lambda self: len(self.world.members) < MOST_MEMBERS)
    @rule(client=st.sampled_from("abcd"), window=WINDOW, start=st.sampled_from(Start))
    def arrive_for_all(self, client: str, window: tuple[int, int], start: Start) -> None:
        lines: list[tuple[Key, Start, int]] = [((topic, -1), start, 1) for topic in TOPICS]
        self.join(self.world.connect(client), "tills", window, self.lines(lines, 1))
        self.over()

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE, window=WINDOW, lines=LINES)
    def subscribe_again(self, choice: int, window: tuple[int, int], lines: list[tuple[Key, Start, int]]) -> None:
        member = self.member(choice)
        assert member.group is not None
        self.join(member, member.group.name, window, self.lines(lines, choice))
        self.over()

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE, window=WINDOW, start=st.sampled_from([Start.RESUME, Start.POSITION]), ends=st.booleans())
    def come_back(self, choice: int, window: tuple[int, int], start: Start, ends: bool) -> None:
        """A client goes on behind what it acknowledged (as it remembers it), on its connection or on another."""
        member = self.member(choice)
        views = {key: view for key, view in self.look(member).items() if view.lease}
        ids = {key: self.world.log(key).identity.log_id_bytes for key in views}
        old = choice % 2 == 0
        lines = [
            Wanted(*key, start, ids[key], 1, max(0, view.before[-1][2]) if old else view.acked)
            for key, view in views.items()
        ]
        if not lines:
            return
        assert member.group is not None
        again, group = member, member.group.name
        if ends:
            member.wire.close("the peer is gone")
        if ends or (choice // 2 % 2 and len(self.world.members) < MOST_MEMBERS):
            again = self.world.connect(member.client_id)
        self.join(again, group, window, lines)
        self.over()

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE, intent=st.sampled_from([Intent.LEAVE, Intent.RELEASE, Intent.RELEASE]), partition=PARTITION)
    def returned(self, choice: int, intent: Intent, partition: int) -> None:
        member = self.member(choice)
        assert member.group is not None
        topic, number = self.some_key(member, choice)
        number = number if partition >= 0 or intent is Intent.RELEASE else -1
        lines = [Wanted(topic, number, Start.COMMITTED, NO_LOG_ID, -1, 0)]
        (self.model.left if intent is Intent.LEAVE else self.model.released)(member, lines)
        subscribe = Subscribe(intent, member.group.name, 0, 0, lines)
        self.ask(member, lambda correlation: frames.write_subscribe(correlation, subscribe), Code.OK)
        self.over()

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE)
    def vanish(self, choice: int) -> None:
        member = self.member(choice)
        member.wire.close("the peer is gone")
        self.over()

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE, fuse=st.integers(1, 3))
    def will_break(self, choice: int, fuse: int) -> None:
        """The connection is over; the broker learns of it when it sends something."""
        self.member(choice).wire.fuse = fuse

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE)
    def fill(self, choice: int) -> None:
        self.member(choice).wire.full = True

    @precondition(lambda self: any(member.wire.full for member in self.world.members))
    @rule(choice=CHOICE)
    def drain(self, choice: int) -> None:
        full = [member for member in self.world.members if member.wire.full]
        self.drained(full[choice % len(full)])
        self.over()

    def drained(self, member: Member) -> None:
        member.wire.full, member.wire.backlog = False, 0
        member.on_drained()

    # ---- acknowledgements ----

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE, part=st.integers(0, 5))
    def handle(self, choice: int, part: int) -> None:
        """A client that does as it should: it acknowledges some of what it has, or all of it."""
        member, key = self.holding(choice)
        view = self.look(member).get(key)
        if view is None:
            return
        offset = view.next if part > 3 else min(view.next, view.acked + part)
        view.acked = offset
        self.acknowledge(member, ConsumerAck(AckKind.CUMULATIVE, *key, view.generation, view.lease, offset))
        self.over()

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE, part=st.integers(0, 2))
    def refuse(self, choice: int, part: int) -> None:
        member, key = self.holding(choice)
        view = self.look(member).get(key)
        if view is None:
            return
        offset = min(view.acked + part, max(view.next - 1, view.acked))
        kind = AckKind.REJECT if choice % 5 == 4 else AckKind.NEGATIVE
        ack = ConsumerAck(kind, *key, view.generation, view.lease, offset, ("", "no", "never")[part])
        self.acknowledge(member, ack)
        self.over()

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE, times=st.integers(2, 3))
    def refuse_again(self, choice: int, times: int) -> None:
        """A record that nobody can handle."""
        for _ in range(times):
            if self.world.members:
                self.refuse(choice, 0)
                self.let_time_pass(8)

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE, times=st.integers(1, 3))
    def die_again(self, choice: int, times: int) -> None:
        """A record that ends or hangs each of its handlers."""
        for number in range(times):
            if not self.world.members:
                return
            member, key = self.holding(choice | 1)
            assert member.group is not None
            name, client = member.group.name, member.client_id
            if (choice >> number) % 2:
                member.wire.close("the peer is gone")
                line = Wanted(*key, Start.COMMITTED, NO_LOG_ID, -1, 0)
                self.join(self.world.connect(client), name, (5, 1 << 20), [line])
                self.let_time_pass(8)
            else:
                self.let_time_pass(36)

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE)
    def be_busy(self, choice: int) -> None:
        member, key = self.holding(choice)
        view = self.look(member).get(key, View())
        self.acknowledge(member, ConsumerAck(AckKind.IN_PROGRESS, *key, view.generation, view.lease, view.acked))
        self.over()

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE, kind=st.sampled_from(list(AckKind)[1:]), offset=OFFSET, other=st.integers(0, 3))
    def say_anything(self, choice: int, kind: AckKind, offset: int, other: int) -> None:
        """Mostly about an earlier lease, another's, or offsets that are not in flight."""
        member = self.member(choice)
        key = KEYS[choice % len(KEYS)]
        view = self.look(member).get(key, View())
        generation, lease = view.generation, view.lease
        if other == 1 and view.before:
            generation, lease, offset = view.before[choice // 8 % len(view.before)]
        elif other == 2:
            generation += 1
        elif other == 3:
            theirs = self.spot(member, key)
            generation, lease, offset = theirs.generation, theirs.lease or 1, theirs.next
        self.acknowledge(member, ConsumerAck(kind, *key, max(0, generation), lease, offset, ""))
        self.over()

    # ---- refreshes ----

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE)
    def ask_for_refresh(self, choice: int) -> None:
        member = self.member(choice)
        key = self.some_key(member, choice)
        spot = self.spot(member, key)
        code = self.model.refresh(spot) if spot.holder is member else Code.STALE
        reset = Reset(frames.NO_RESET, NO_LOG_ID, *key, 0, 0)
        self.ask(member, lambda correlation: frames.write_reset(correlation, reset), code)
        self.over()

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE, further=st.integers(0, 5), wrong=st.integers(0, 5))
    def accept(self, choice: int, further: int, wrong: int) -> None:
        member = self.member(choice)
        key = self.some_key(member, choice)
        view = self.look(member).get(key)
        if view is None or view.refresh is None:
            return
        reset_id = view.refresh.reset_id if wrong else b"\x01" * 16
        offset = max(0, view.refresh.from_offset + further - 2)
        code = self.model.accepted(member, self.spot(member, key), reset_id, offset)
        reset = view.refresh._replace(reset_id=reset_id, from_offset=offset)
        self.ask(member, lambda correlation: frames.write_reset(correlation, reset), code)
        self.over()

    @precondition(lambda self: self.world.members)
    @rule(choice=CHOICE, short=st.integers(-2, 2), wrong=st.integers(0, 5))
    def say_ready(self, choice: int, short: int, wrong: int) -> None:
        member = self.member(choice)
        key = self.some_key(member, choice)
        view = self.look(member).get(key)
        if view is None or view.refresh is None:
            return
        reset_id = view.refresh.reset_id if wrong else b"\x02" * 16
        ready = Ready(reset_id, *key, max(0, view.refresh.target - short))
        code = self.model.ready(member, self.spot(member, key), ready)
        self.ask(member, lambda correlation: frames.write_ready(correlation, ready), code)
        self.over()

    @rule(choice=CHOICE)
    def damage(self, choice: int) -> None:
        """Something of a table is lost."""
        log = self.world.log(("items", choice % 2))
        if log.durable_end:
            offset = choice // 2 % log.durable_end
            log.corrupt_ranges.append(CorruptRange(offset, offset + 1))

    @rule(choice=CHOICE)
    def snapshot(self, choice: int) -> None:
        key = ("items", choice % 2)
        log = self.world.log(key)
        self.world.engine.complete_snapshot(log, log.durable_end, log.durable_end, lambda code, _: None)
        for group in self.model.groups.values():
            spot = self.model.spot(group, key)
            if spot.waits == "no_snapshot":
                self.model.refresh(spot)
        self.world.core.refreshes.snapshot_completed(log)
        self.over()

    # ---- operators ----

    @precondition(lambda self: self.model.groups)
    @rule(choice=CHOICE, to=st.sampled_from(["earliest", "latest", "@", "", "+", "-"]), offset=OFFSET)
    def move(self, choice: int, to: str, offset: int) -> None:
        key = KEYS[choice % len(KEYS)]
        name = sorted(self.model.groups)[choice // 8 % len(self.model.groups)]
        group, end = self.world.groups.find(name), len(self.model.records[key])
        if group is None:
            return
        spot, answers = self.model.spot(self.model.groups[name], key), list[tuple[list[Move], str]]()
        if to in ("+", "-"):
            shift = 2 if to == "+" else -2
            request, target = MoveRequest(topic=key[0], partition=key[1], shift=shift), (spot.committed or 0) + shift
        elif to in ("earliest", "latest"):
            request, target = MoveRequest(topic=key[0], partition=key[1], to=to), {"latest": end}.get(to, 0)
        else:
            request, target = MoveRequest(topic=key[0], partition=key[1], to=f"{to}{offset}"), offset
        refused = spot.refreshing or (to == "" and offset > end)
        before = -1 if spot.committed is None else spot.committed
        target = min(max(0, target), end)
        if not refused:
            self.model.moved(spot, target)
        self.world.operations.move(group, request, lambda moves, _, error: answers.append((moves, error)))
        self.over()
        if answers:
            assert bool(answers[0][1]) == refused
            assert refused or [move[1:] for move in answers[0][0]] == [(before, target)]

    @precondition(lambda self: self.model.groups)
    @rule(choice=CHOICE)
    def refresh(self, choice: int) -> None:
        key = KEYS[choice % len(KEYS)]
        name = sorted(self.model.groups)[choice // 8 % len(self.model.groups)]
        group, answers = self.world.groups.find(name), list[Code]()
        if group is None:
            return
        code = self.model.refresh(self.model.spot(self.model.groups[name], key))
        self.world.core.refreshes.begin(group, self.world.log(key), lambda outcome, _: answers.append(outcome.code))
        self.over()
        assert not answers or answers == [code]

    @precondition(lambda self: self.model.groups and self.world.settled)
    @rule(choice=CHOICE)
    def delete(self, choice: int) -> None:
        name = sorted(self.model.groups)[choice % len(self.model.groups)]
        group = self.world.groups.find(name)
        if group is not None:
            assert bool(self.world.operations.delete(group)) == bool(self.model.groups[name].entries)
            if not self.model.groups[name].entries:
                del self.model.groups[name]

    # ---- time and trouble ----

    @rule(quarters=QUARTERS)
    def let_time_pass(self, quarters: int) -> None:
        self.together = 0
        self.world.advance(quarters / 4)
        self.over()

    @rule(count=st.integers(1, 3))
    def fall_together(self, count: int) -> None:
        self.together = count

    @precondition(lambda self: self.world.members)
    @rule(really=st.sampled_from([True, False, False, False]))
    def restart(self, really: bool) -> None:
        if not really:
            return
        self.model.restarted()
        self.together = 0
        self.world.start(self.model)
        self.over()

    @rule(refused=st.sampled_from([None, (Outcome.DISK_FULL, "the disk is full")]), unreadable=st.booleans())
    def change_disk(self, refused: tuple[Code, str] | None, unreadable: bool) -> None:
        """Nothing can be written, or stored records cannot be read."""
        engine = self.world.engine
        if engine.unreadable and not unreadable:
            self.model.readable_from = self.model.now + RETRY_SECONDS
        engine.refused, engine.unreadable = refused, unreadable

    @rule(slow=st.booleans())
    def change_pace(self, slow: bool) -> None:
        self.world.engine.stores_slowly = slow
        if not slow:
            self.world.engine.store()
        self.over()

    @rule(choice=CHOICE, cold=st.booleans())
    def change_temperature(self, choice: int, cold: bool) -> None:
        self.world.log(KEYS[choice % len(KEYS)]).cold = cold

    @invariant()
    def the_broker_is_the_model(self) -> None:
        if self.world.settled:
            self.model.check()

    # ---- once all is well, everything is handled ----

    def teardown(self) -> None:
        self.together = 0
        self.change_disk(refused=None, unreadable=False)
        self.change_pace(slow=False)
        for key in KEYS:
            self.world.log(key).cold = False
        self.world.settle()
        everything = self.lines([((topic, -1), Start.COMMITTED, 0) for topic in TOPICS], 1)
        for member in list(self.world.members):
            member.wire.fuse = 0
            self.drained(member)
            assert member.group is not None
            self.join(member, member.group.name, (7, 1 << 20), everything)
        for name in list(self.model.groups):
            self.join(self.world.connect("drain"), name, (7, 1 << 20), everything)
        self.world.settle()
        for _ in range(DRAIN_ROUNDS):
            for member in list(self.world.members):
                self.do_as_told(member)
            self.world.advance(0.5)
            self.model.check()
            if all(self.is_done(spot) for spot in self.model.spots() if spot.group.entries):
                return
        raise AssertionError("not everything was handled")

    def do_as_told(self, member: Member) -> None:
        for key, view in self.look(member).items():
            spot = self.spot(member, key)
            if view.refresh is not None and spot.holder is member and spot.refreshing:
                reset, end = view.refresh, spot.acked
                if spot.waits == "refresh":
                    assert self.model.accepted(member, spot, reset.reset_id, reset.from_offset) is Code.OK
                    self.ask(member, lambda number, it=reset: frames.write_reset(number, it), Code.OK)  # type: ignore[misc]
                elif end >= reset.target:
                    ready = Ready(reset.reset_id, *key, end)
                    assert self.model.ready(member, spot, ready) is Code.OK
                    self.ask(member, lambda number, it=ready: frames.write_ready(number, it), Code.OK)  # type: ignore[misc]
            if view.next > view.acked:
                view.acked = view.next
                self.acknowledge(member, ConsumerAck(AckKind.CUMULATIVE, *key, view.generation, view.lease, view.next))

    def is_done(self, spot: Spot) -> bool:
        return spot.committed == len(self.model.records[spot.key]) and not spot.refreshing and not spot.revoking


class SteppedMachine(DeliveryMachine):
    """Turns are short: one partition is handed out in each, and one cursor that waits is served."""

    def start(self) -> None:
        membership.SLICE_SECONDS = push.SLICE_SECONDS = push.TURN_SECONDS = -1.0
        super().start()

    def teardown(self) -> None:
        membership.SLICE_SECONDS = push.SLICE_SECONDS = SLICE_SECONDS
        push.TURN_SECONDS = TURN_SECONDS
        super().teardown()


EXAMPLES = int(os.environ.get("EB_MODEL_EXAMPLES", "0"))
TestDelivery = DeliveryMachine.TestCase
TestDeliveryInSteps = SteppedMachine.TestCase
TestDelivery.settings = TestDeliveryInSteps.settings = settings(
    derandomize=not EXAMPLES,
    deadline=None,
    max_examples=EXAMPLES or 100,
    stateful_step_count=40,
    database=None,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)
