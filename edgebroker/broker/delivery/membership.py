"""Who is a member of a group and which partitions it holds: joining, leaving, moving partitions, vanishing.

After every change the partitions are assigned again (assignment.py). A partition that moves is first revoked: its
holder gets nothing more, and it changes hands when what is in flight was acknowledged, timed out, or its connection
closed. A member that let a delivery time out gets no partition that another wants, until it is heard again.

A member may hold thousands of partitions. What is done about more than AT_ONCE of them at a time is done for 2 ms at
the end of each turn, so that nothing else waits for long.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import partial

from edgebroker.broker.delivery.assignment import assign
from edgebroker.broker.delivery.leases import Leases
from edgebroker.broker.delivery.state import Cursor, CursorState, Group, Subscription
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.ports import Key, Member
from edgebroker.common.messages import ConsumerAck, Wanted
from edgebroker.common.runtime.scheduler import SLICE_SECONDS, Scheduler
from edgebroker.common.types import Start
from edgebroker.storage.engine import Engine, Log

Consumer = Member[Cursor]
# Partitions that a member begins at although others wait for their turn: by whom, and where the log ended then.
Fresh = dict[tuple[Consumer, Key], int]

AT_ONCE = 100


class Membership:
    """Owned by the loop thread. `frozen`: the node stops, partitions change hands no more."""

    def __init__(self, engine: Engine, leases: Leases, scheduler: Scheduler, metrics: Metrics) -> None:
        self._engine, self._leases, self._scheduler, self._metrics = engine, leases, scheduler, metrics
        # Groups to assign again, and what of the rest was too much for one turn.
        self._dirty: dict[Group, Fresh] = {}
        self._later: deque[Callable[[], None]] = deque()
        self._steps: Iterator[None] | None = None
        self._revoking: dict[Cursor, None] = {}
        self._groups_of: dict[Consumer, Group] = {}
        # Partitions that all members together want.
        self.wanted = 0
        self.frozen = False

    def groups(self) -> set[Group]:
        """The groups that have members now, those without a name as well."""
        return set(self._groups_of.values())

    def wanted_of(self, member: Consumer) -> int:
        """How many partitions a member wants."""
        group = self._groups_of.get(member)
        return group.members[member].size if group is not None else 0

    def topics_of(self, member: Consumer) -> set[str]:
        """The topics of which a member wants partitions, whether it has some or waits for them."""
        group = self._groups_of.get(member)
        if group is None:
            return set()
        entry = group.members[member]
        return {*entry.topics, *(topic for topic, _ in entry.pins)}

    def more_wanted(self, member: Consumer, wanted: list[Wanted]) -> int:
        """How many more it would want with these lines (at most: a line may be about a partition of a topic that it
        wants)."""
        group = self._groups_of.get(member)
        entry = group.members[member] if group is not None else Subscription(0, 0, 0)
        topics = {line.topic for line in wanted if line.partition == -1}.difference(entry.topics)
        pins = {(line.topic, line.partition) for line in wanted if line.partition != -1}.difference(entry.pins)
        return sum(len(self._engine.partitions(topic)) for topic in topics) + len(pins)

    def _count(self, entry: Subscription) -> None:
        """What a member wants has changed."""
        self.wanted -= entry.size
        entry.size = sum(len(self._engine.partitions(topic)) for topic in entry.topics) + len(entry.pins)
        self.wanted += entry.size

    def _remove(self, group: Group, member: Consumer) -> None:
        """A member wants nothing any more."""
        entry = group.members.pop(member, None)
        self._groups_of.pop(member, None)
        if entry is not None:
            self.wanted -= entry.size

    def subscribe(
        self, member: Consumer, group: Group, wanted: list[Wanted], correlation: int, windows: tuple[int, int]
    ) -> None:
        """Join the group, or say more; the topics exist. `correlation` is the member's own number for this, handed back
        in Cursor.correlation; `windows`: records and bytes in flight.

        Where a line says to begin counts at once for what the member holds or was free; a partition that is taken
        over from another client begins at the committed offset.
        """
        entry = group.members.get(member)
        if entry is None:
            entry = group.members[member] = Subscription(correlation, *windows)
            self._groups_of[member] = group
        entry.correlation, entry.unresponsive = correlation, False
        entry.window_records, entry.window_bytes = windows
        named: dict[Key, None] = {}
        for line in _last_lines(wanted):
            keys = [(line.topic, log.partition) for log in self._engine.partitions(line.topic)]
            if line.partition == -1:
                entry.topics[line.topic] = line
                entry.left.difference_update(keys)
                for key in keys:
                    entry.pins.pop(key, None)
            else:
                keys = [(line.topic, line.partition)]
                entry.pins[keys[0]] = line
            named.update(dict.fromkeys(keys))
        entry.begun.difference_update(named)
        self._count(entry)
        fresh: Fresh = {}
        begin: list[Callable[[], None]] = []
        for key in named:
            cursor, log = group.holders.get(key), self._engine.log(*key)
            if cursor is not None and cursor.member is member:
                cursor.correlation = correlation
                cursor.window_records, cursor.window_bytes = windows
                cursor.revoking = False
                self._leases.suspend(cursor)
                begin.append(partial(self._begin_again, cursor))
            elif log is not None and (cursor is None or cursor.member not in group.members):
                fresh[member, key] = log.durable_end
        self._changed(group, fresh)
        self._do(begin)

    def _begin_again(self, cursor: Cursor) -> None:
        """A member said where it begins in a partition that it holds."""
        group, entry = cursor.group, cursor.group.members.get(cursor.member)
        if entry is not None and group.holders.get(cursor.key) is cursor:
            self._leases.committed(cursor, self._line(group, cursor, entry))

    def _do(self, work: list[Callable[[], None]]) -> None:
        """Do something about partitions: AT_ONCE of them now, the others in the turns that follow."""
        self._later.extend(work[AT_ONCE:])
        for one in work[:AT_ONCE]:
            one()

    def release(self, member: Consumer, group: Group, wanted: list[Wanted]) -> None:
        """Give partitions back now that are being revoked; what is in flight will be delivered to the next holder."""
        for line in wanted:
            cursor = group.holders.get((line.topic, line.partition))
            if cursor is not None and cursor.member is member and cursor.revoking:
                self._leases.release(cursor, tell=True)
        self._changed(group)

    def leave(self, member: Consumer, group: Group, wanted: list[Wanted]) -> None:
        """Give partitions back and want them no more. What is in flight will be delivered to the next holder."""
        entry = group.members.get(member)
        if entry is None:
            return
        topics = {line.topic for line in wanted if line.partition == -1}
        keys = {(line.topic, line.partition) for line in wanted if line.partition != -1}
        for topic in topics:
            entry.topics.pop(topic, None)
        for key in [key for key in entry.pins if key[0] in topics or key in keys]:
            del entry.pins[key]
        entry.left.update(key for key in keys if key[0] in entry.topics and self._engine.log(*key) is not None)
        entry.begun = {key for key in entry.begun if key[0] not in topics and key not in keys}
        for key, cursor in list(member.cursors.items()):
            if key[0] in topics or key in keys:
                self._leases.release(cursor, tell=False)
        self._count(entry)
        if not entry.size:
            self._remove(group, member)
        self._changed(group)

    def forget_topic(self, group: Group, topic: str) -> None:
        """A topic is deleted: no member wants it any more. Its holder was told."""
        for member, entry in list(group.members.items()):
            entry.topics.pop(topic, None)
            for key in [key for key in entry.pins if key[0] == topic]:
                del entry.pins[key]
            for keys in (entry.left, entry.begun):
                keys.difference_update([key for key in keys if key[0] == topic])
            self._count(entry)
            if not entry.size:
                self._remove(group, member)
        self._changed(group)

    def vanished(self, member: Consumer, group: Group) -> None:
        """The member's connection is over."""
        self._remove(group, member)
        self._do([partial(self._end, cursor) for cursor in member.cursors.values()])
        self._changed(group)

    def _end(self, cursor: Cursor) -> None:
        """The connection of a cursor's member is over."""
        if cursor.group.holders.get(cursor.key) is cursor:
            if not self.frozen:
                self._leases.disconnected(cursor)
            self._leases.release(cursor, tell=False)
            self._changed(cursor.group)

    def acknowledge(self, member: Consumer, group: Group, ack: ConsumerAck) -> bool:
        """A consumer's ACK; False when it is stale and changed nothing."""
        cursor = group.holders.get((ack.topic, ack.partition))
        accepted = cursor is not None and cursor.member is member and self._leases.acknowledge(cursor, ack)
        if accepted and cursor is not None and cursor.revoking and not cursor.in_flight:
            self._leases.release(cursor, tell=True)
            self._changed(group)
        entry = group.members.get(member)
        if entry is not None and entry.unresponsive:
            entry.unresponsive = False
            self._changed(group)
        return accepted

    def timed_out(self, cursor: Cursor) -> None:
        """What the cursor has in flight is overdue: another member gets the partition, if there is one."""
        group = cursor.group
        if group.holders.get(cursor.key) is not cursor or cursor.member not in group.members:
            return
        self._leases.timed_out(cursor)
        group.members[cursor.member].unresponsive = True
        others = (member for member in self._candidates(group, cursor.key) if not group.members[member].unresponsive)
        if cursor.revoking or next(others, None) is not None:
            self._leases.release(cursor, tell=True)
        else:
            self._leases.resume(cursor, cursor.acked)
        self._changed(group)

    def refreshed(self, group: Group) -> None:
        """A refresh is over: its partition may move again."""
        self._changed(group)

    def _candidates(self, group: Group, key: Key) -> list[Consumer]:
        """Who wants a partition, those who came first in front."""
        return [member for member, entry in group.members.items() if entry.wants(key)]

    def _changed(self, group: Group, fresh: Fresh | None = None) -> None:
        """Rebalance the group at the end of this turn. `fresh`: lines that say where a member begins, as
        the partition was free when they came."""
        self._dirty.setdefault(group, {}).update(fresh or {})

    def rebalance(self) -> None:
        """Hand out what is free and revoke what has to move, for 2 ms; the rest at the end of the turns that follow.
        Many changes of one turn cost one rebalance."""
        if self._revoking and not self.frozen:
            self._release_idle()
        if not (self._steps or self._dirty or self._later) or self.frozen:
            return
        until = self._scheduler.clock_now() + SLICE_SECONDS
        # When a step fails, the others are for the next turn.
        steps, self._steps = self._steps or self._work(), None
        for _ in steps:
            if self._scheduler.clock_now() >= until:
                self._steps = steps
                self._scheduler.call_later(0.0, lambda: None)
                return

    def freeze(self) -> None:
        """The node stops. A member that was answered OK before begins where it said; then nothing changes hands."""
        for _ in self._steps or self._work():
            pass
        self.frozen = True

    def _work(self) -> Iterator[None]:
        while self._later or self._dirty:
            while self._later:
                self._later.popleft()()
                yield
            if self._dirty:
                group = next(iter(self._dirty))
                yield from self._rebalance_group(group, self._dirty.pop(group))

    def _release_idle(self) -> None:
        """What was in flight of a revoked partition may be void: its offset was moved, or a refresh began."""
        for cursor in list(self._revoking):
            if cursor.state is CursorState.GONE or not cursor.revoking:
                del self._revoking[cursor]
            elif not cursor.in_flight:
                self._leases.release(cursor, tell=True)
                self._changed(cursor.group)

    def _rebalance_group(self, group: Group, fresh: Fresh) -> Iterator[None]:
        wanted_by = self.wanted_by(group, responsive=True)
        yield
        holders = {key: cursor.member for key, cursor in group.holders.items() if not cursor.revoking}
        refreshing = {key for key, committed in group.committed_offsets.items() if committed.refreshing}
        moved = 0
        for key, member in (yield from assign(wanted_by, holders, refreshing)).items():
            holder, entry = group.holders.get(key), group.members.get(member)
            if (holder is not None and holder.member is member) or entry is None or not entry.wants(key):
                continue  # it has gone, or wants this no more, since it was found out: another rebalance follows
            self._move(group, key, member, fresh)
            moved += 1
            if moved % AT_ONCE == 0 and group in self._dirty:
                self._dirty[group] = {**fresh, **self._dirty[group]}
                return  # the facts are other ones
            yield

    def _move(self, group: Group, key: Key, member: Consumer, fresh: Fresh) -> None:
        """Give a partition to a member, or see to it that it becomes free."""
        holder, log = group.holders.get(key), self._engine.log(*key)
        if holder is not None and not holder.revoking:
            self._metrics.revocations += 1
            self._leases.revoke(holder)
            if not holder.in_flight and group.holders.get(key) is holder:
                self._leases.release(holder, tell=True)
            self._revoking[holder] = None
            holder = group.holders.get(key)
        if holder is None and log is not None:
            self._grant(group, log, member, fresh.get((member, key)))

    def wanted_by(self, group: Group, *, responsive: bool = False) -> dict[Key, list[Consumer]]:
        """For each partition the members that want it, those who came first in front. `responsive`: those that let no
        delivery time out, where there are any."""
        by_topic: dict[str, list[Consumer]] = {}
        special: dict[str, dict[Key, list[Consumer]]] = {}
        for member, entry in group.members.items():
            for topic in entry.topics:
                by_topic.setdefault(topic, []).append(member)
            for key in (*entry.pins, *entry.left):
                special.setdefault(key[0], {})[key] = []
        for member, entry in group.members.items():
            topics = entry.topics if len(entry.topics) < len(special) else special
            wanted = {key for topic in topics if topic in entry.topics for key in special.get(topic, ())}
            for key in (wanted - entry.left).union(entry.pins):
                special[key[0]][key].append(member)
        if responsive:
            by_topic = {topic: self._responsive(group, members) for topic, members in by_topic.items()}
        wanted_by = {
            (topic, log.partition): by_topic[topic] for topic in by_topic for log in self._engine.partitions(topic)
        }
        for keys in special.values():
            for key, members in keys.items():
                if self._engine.log(*key) is not None:
                    wanted_by[key] = self._responsive(group, members) if responsive else members
        return wanted_by

    @staticmethod
    def _responsive(group: Group, members: list[Consumer]) -> list[Consumer]:
        return [member for member in members if not group.members[member].unresponsive] or members

    def _grant(self, group: Group, log: Log, member: Consumer, end: int | None) -> None:
        entry = group.members[member]
        cursor = Cursor(group, log, member, entry.window_records, entry.window_bytes)
        cursor.correlation = entry.correlation
        self._metrics.assignments += 1
        line = self._line(group, cursor, entry, fresh=end is not None)
        if line is not None and end is not None and line.start is Start.LATEST:  # when it was said, not by now
            line = line._replace(start=Start.OFFSET, value=min(end, log.durable_end))
        self._leases.grant(cursor, line)

    @staticmethod
    def _line(group: Group, cursor: Cursor, entry: Subscription, *, fresh: bool = True) -> Wanted | None:
        """Where a member said that it begins; None when that does not count, but the committed offset."""
        line, last = entry.take_line(cursor.key), group.last_clients.get(cursor.key)
        if line is None:
            return None
        # A client whose old connection lingered takes over from itself.
        own = last == cursor.member.client_id
        if line.start is Start.RESUME:
            return line if own or last is None else None
        return line if fresh or (own and line.start is Start.POSITION) else None


def _last_lines(wanted: list[Wanted]) -> list[Wanted]:
    """Of several lines about the same the last one: a frame has room for 65,535, a topic has fewer partitions."""
    lines: dict[Key, Wanted] = {}
    for line in wanted:
        lines.pop((line.topic, line.partition), None)
        lines[line.topic, line.partition] = line
    return list(lines.values())
