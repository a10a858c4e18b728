"""The logs that a node mirrors: made, changed, truncated and recreated, as the follower and its parent say.

Whatever takes time is begun with Flow.begin(), which holds the pipe up, and over with Flow.done().
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import partial
from typing import NamedTuple, Protocol

from msgspec.structs import replace

from edgebroker.broker.observe.metrics import Metrics
from edgebroker.common.batch import read_header
from edgebroker.common.errors import Code
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.gather import gather
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.types import TopicPartition
from edgebroker.pipe.follower import (
    CompareChain,
    Event,
    FindBoundaries,
    FollowedLog,
    Follower,
    LogDeleted,
    RecreateLog,
    SkipRecords,
    TruncateLog,
)
from edgebroker.pipe.stream import MAX_BEYOND_BYTES, PartitionInfo, Point, TopicInfo
from edgebroker.storage.engine import Log, MirrorEngine
from edgebroker.storage.types import ChainPoint, ColdRead, Identity

log = logging.getLogger(__name__)

STORED_SECONDS = 0.1
TOPIC_RETRY_SECONDS = 10.0
SHOW_SECONDS = 0.5
# A log with so many gaps keeps nothing from before the next one.
MAX_GAPS = 64


class ReaderHooks(NamedTuple):
    """What the node does with its readers when a log changes under them. `truncating` moves committed offsets that are
    after an offset and calls back once that is stored; `truncated` and `recreated` are called when it is done, the
    latter with True when it is another log; `delete` ends a topic, of which its origin has deleted histories first to
    last."""

    truncating: Callable[[Log, int, Callable[[], None]], None]
    truncated: Callable[[Log], None]
    recreated: Callable[[Log, bool], None]
    delete: Callable[[str, int, int, Done], None]


class Flow(Protocol):
    """The pipe, as far as the mirrors hold it up."""

    stopped: bool

    def begin(self) -> None: ...
    def done(self, *, failed: bool = False) -> None: ...
    def again(self, reason: str) -> None:
        """What was asked of the parent is not what has to be asked now."""

    def do(self, events: Iterable[Event]) -> None: ...


class Mirrors:
    """Owned by the loop thread."""

    def __init__(
        self,
        engine: MirrorEngine,
        scheduler: Scheduler,
        metrics: Metrics,
        uid: str,
        follower: Follower,
        flow: Flow,
        hooks: ReaderHooks,
    ) -> None:
        self._engine, self._loop, self._metrics, self._uid = engine, scheduler, metrics, uid
        self._follower, self._flow, self._hooks = follower, flow, hooks
        self._offered: dict[str, TopicInfo] = {}
        self._changing: set[str] = set()
        self._deleting: set[str] = set()
        # Topics of the parent that are not taken over, and why: in the way is one of this name, or something else.
        self.clashes: dict[str, str] = {}
        self.refused: dict[str, str] = {}

    def do(self, event: Event) -> None:
        """What the follower found out."""
        if isinstance(event, CompareChain):
            self._compare(event)
        elif isinstance(event, FindBoundaries):
            self._look(event)
        elif isinstance(event, TruncateLog):
            self._cut(event)
        elif isinstance(event, RecreateLog):
            self._restart(event)
        elif isinstance(event, SkipRecords):
            self._skip(event)
        elif isinstance(event, LogDeleted):
            self._delete(event)

    def follow(self, partition: Log) -> None:
        """Begin at the end of a log."""
        self._follower.follow(
            TopicPartition(partition.topic, partition.partition),
            partition.identity.log_id,
            partition.staged_epoch,
            partition.log_start,
            partition.written_end,
            max(partition.chain, 0),  # not known behind damage: then the parent finds where the logs part
        )

    def on_durable(self, partition: Log) -> None:
        """The snapshot that was described may be complete here now."""
        offered = self._offered.get(partition.topic)
        if offered is None or offered.name in self._changing:
            return
        if len(offered.partitions) == len(self._engine.partitions(offered.name)):
            first, following = offered.partitions[partition.partition].snapshot
            if partition.identity.snapshot[0] < first and partition.durable_end >= following:
                self._change(offered)

    # ---- topics ----

    def offered(self, info: TopicInfo) -> None:
        """The parent describes a topic that is new, or has changed."""
        self._offered[info.name] = info
        self._topic(info)

    def _topic(self, info: TopicInfo) -> None:
        if not self._follower.wants(info.name):
            return
        logs = self._engine.partitions(info.name)
        self.refused.pop(info.name, None)
        if not logs and self._was_deleted(info):
            self.refused[info.name] = "it was deleted, by what this node was told; the parent has it"
            self._follower.known[info.name] = info.digest
        elif not logs:
            self._create(info)
        elif logs[0].identity.origin == self._uid and _superseded(info, logs):
            self._step_down(info)
        elif logs[0].identity.origin == self._uid:
            if info.name not in self.clashes:
                self._metrics.refused(Code.NAME_CLASH.name)
                log.error("topic %s is written at this node and at its parent; only this node's is served", info.name)
            self.clashes[info.name] = "written at this node and at its parent"
            self._follower.known[info.name] = info.digest
        elif len(logs) != len(info.partitions):
            self.clashes[info.name] = f"has {len(logs)} partitions here, {len(info.partitions)} at the parent"
        elif any(one.identity.log_id == part.log_id for one, part in zip(logs, info.partitions, strict=True)):
            self._change(info)
        else:
            self._follower.known[info.name] = info.digest  # another log: the lines say so

    def _delete(self, event: LogDeleted) -> None:
        """Its origin has deleted it, unless what is here is of a newer history: then that came back since."""
        topic = event.line.key.topic
        logs = self._engine.partitions(topic)
        if not logs or topic in self._deleting or any(one.identity.origin == self._uid for one in logs):
            return
        # Where the lines stand is what the parent judged; the histories may have been told anew since.
        lines = [line for line in self._follower.lines.values() if line.key.topic == topic]
        newer = any(one.identity.epoch > event.epoch for one in logs)
        if newer or not all(event.first <= line.epoch <= event.epoch for line in lines):
            event.line.state, event.line.why = "not_carried", "the parent knows only that it was deleted before"
            return
        self._flow.begin()
        self._deleting.add(topic)
        for line in lines:
            line.state = "moving"
        log.warning("topic %s was deleted by its origin, and is deleted here", topic)

        def done(outcome: Outcome, message: str) -> None:
            self._deleting.discard(topic)
            if outcome is not Outcome.OK:
                log.error("%s", message)
            for partition in self._engine.partitions(topic):
                self.follow(partition)
            if not self._engine.partitions(topic):
                self._follower.drop(topic)
                self._offered.pop(topic, None)
                self.clashes.pop(topic, None)
            self._flow.done(failed=outcome is not Outcome.OK)

        self._hooks.delete(topic, event.first, event.epoch, done)

    def free(self, topic: str) -> None:
        """Nothing of this node is in the way of a topic any more: what the parent has of that name is taken."""
        blocked = self.clashes.pop(topic, None) is not None or self.refused.pop(topic, None) is not None
        if blocked and topic in self._offered:
            self._topic(self._offered[topic])
        elif not self._engine.partitions(topic):
            self._follower.drop(topic)

    def forget_offers(self) -> None:
        """Another node is the parent: what the one before had says nothing about it, which describes its topics
        again."""
        self._follower.known.clear()
        if self.clashes or self.refused:
            self.clashes.clear()
            self.refused.clear()
            self._flow.again("the parent is another node")

    def _was_deleted(self, info: TopicInfo) -> bool:
        """True for a topic that its origin has deleted, and that this parent does not know of yet."""
        found = [self._engine.tombstones.get(part.log_id) for part in info.partitions]
        return any(
            one is not None and one.covers(part.epochs[-1][0]) for one, part in zip(found, info.partitions, strict=True)
        )

    def _create(self, info: TopicInfo) -> None:
        self._flow.begin()

        def again() -> None:
            if not self._flow.stopped and not self._engine.partitions(info.name):
                self._topic(self._offered.get(info.name, info))

        def done(outcome: Outcome, message: str) -> None:
            self._flow.done()
            late = self._follower.known.get(info.name) == info.digest
            # Also when it failed: the other topics do not wait for this one.
            self._follower.known[info.name] = info.digest
            if outcome not in (Outcome.OK, Outcome.NAME_CLASH):
                log.error("topic %s cannot be taken over: %s; trying again", info.name, message)
                self.refused[info.name] = message
                self._loop.call_later(TOPIC_RETRY_SECONDS, again)
                return
            for partition in self._engine.partitions(info.name):
                if partition.identity.origin != self._uid:
                    self.follow(partition)
            if late:
                self._flow.again("a topic was made")

        identities = [identity_of(info, part) for part in info.partitions]
        self._engine.create_mirror(info.name, identities, done)

    def _change(self, info: TopicInfo) -> None:
        """Take over what the origin decides: settings, histories (once the log is of them), the newest snapshot (once
        its records are here)."""
        logs = self._engine.partitions(info.name)
        changes = [_changing(info, part, one) for part, one in zip(info.partitions, logs, strict=True)]
        if all(change(one.identity) == one.identity for change, one in zip(changes, logs, strict=True)):
            self._follower.known[info.name] = info.digest
            return
        self._flow.begin()
        self._changing.add(info.name)

        def done(outcome: Outcome, message: str) -> None:
            self._flow.done()
            self._changing.discard(info.name)
            self._follower.known[info.name] = info.digest
            if outcome is not Outcome.OK:
                log.error("%s; trying again", message)
                self._loop.call_later(TOPIC_RETRY_SECONDS, again)

        def again() -> None:
            offered = self._offered.get(info.name)  # it may have been deleted meanwhile
            if offered is not None:
                self._topic(offered)

        self._engine.change_identities(info.name, changes, done)

    def _step_down(self, info: TopicInfo) -> None:
        """Another node was promoted to write what this one wrote: follow it."""
        logs = self._engine.partitions(info.name)
        log.warning("topic %s is written by node %s now: it is followed", info.name, info.partitions[0].origin)
        self._flow.begin()

        def change(old: Identity, part: PartitionInfo, epochs: list[tuple[int, int]]) -> Identity:
            return replace(old, origin=part.origin, epochs=epochs, settings=info.settings)

        def done(outcome: Outcome, message: str) -> None:
            self._flow.done()
            if outcome is not Outcome.OK:
                log.error("%s; trying again", message)
                self._loop.call_later(TOPIC_RETRY_SECONDS, lambda: self._topic(info))
                return
            self._follower.known[info.name] = info.digest
            for partition in logs:
                self.follow(partition)
            self._flow.again("a topic of this node is followed now")

        changes = [
            partial(change, part=part, epochs=_epochs(part, one))
            for part, one in zip(info.partitions, logs, strict=True)
        ]
        self._engine.change_identities(info.name, changes, done)

    def accept(self, topic: str, done: Done) -> None:
        """An operator takes the parent's log instead of the one that was replaced; the old data is quarantined."""
        replaced = [
            line for line in self._follower.lines.values() if line.key.topic == topic and line.state == "replaced"
        ]
        if not replaced or topic not in self._offered:
            done(Outcome.NOT_FOUND, f"{topic} was not replaced at the parent; there is nothing to accept")
            return
        self._recreate(replaced, done)

    def recreate(self, topic: str, done: Done) -> None:
        """Fetch a topic again, all that the parent has of it; what is here is quarantined first."""
        lines = [line for line in self._follower.lines.values() if line.key.topic == topic]
        if not lines or topic not in self._offered:
            done(Outcome.NOT_FOUND, f"{topic} is not mirrored from the parent of this node now")
            return
        self._recreate(lines, done)

    def _recreate(self, lines: list[FollowedLog], done: Done) -> None:
        info = self._offered[lines[0].key.topic]

        def all_done(outcome: Outcome, message: str) -> None:
            done(outcome, message)
            self._flow.again("a log was recreated")

        one = gather(len(lines), all_done)

        def recreated(partition: Log, log_id: str, outcome: Outcome, message: str) -> None:
            self._flow.done()
            self.follow(partition)
            if outcome is Outcome.OK:
                self._hooks.recreated(partition, partition.identity.log_id != log_id)
            one(outcome, message)

        for line in lines:
            found = self._engine.log(*line.key)
            assert found is not None
            line.state = "moving"
            self._flow.begin()
            self._metrics.logs_recreated += 1
            taken = identity_of(info, info.partitions[line.key.partition])
            self._engine.recreate(found, partial(_replace_by, taken), partial(recreated, found, found.identity.log_id))

    # ---- when the logs are not the same ----

    def _compare(self, event: CompareChain) -> None:
        partition = self._engine.log(*event.line.key)
        assert partition is not None

        def done(points: list[ChainPoint], error: str) -> None:
            self._flow.done()
            # Without an answer of the disk the parent is taken to be behind. No boundary there: another log.
            same = bool(error) or not points or (event.offset, event.chain) in [tuple(point) for point in points]
            self._flow.do(self._follower.compared(event.line, same, event.offset))
            if not same:
                self._flow.again("its log is another one")
            elif self._follower.parent == partition.identity.origin:
                self._show(event.line, partition, event.offset)

        self._flow.begin()
        self._engine.chains(partition, [event.offset], done)

    def _show(self, line: FollowedLog, partition: Log, offset: int) -> None:
        """The parent writes this log, and has lost what lies behind its end: it believes what it sees."""

        def again() -> None:
            # Not at once: it may be true of many logs, and an end that moves would make it a loop.
            self._loop.call_later(SHOW_SECONDS, lambda: self._flow.again("it is shown what it lacks"))

        if line.beyond_at == offset:
            if line.beyond and not line.shown:
                again()
            return

        def done(result: ColdRead) -> None:
            self._flow.done()
            if result.error or result.corrupt is not None or line.state != "behind":
                return
            size = read_header(result.data).size
            line.show(bytes(result.data[:size]) if size <= MAX_BEYOND_BYTES else b"", offset)
            again()

        self._flow.begin()
        self._engine.read_cold(partition, offset, 1, done)

    def _look(self, event: FindBoundaries) -> None:
        partition = self._engine.log(*event.line.key)
        assert partition is not None

        def done(points: list[ChainPoint], error: str) -> None:
            self._flow.done(failed=bool(error))
            if error:
                log.warning("%s cannot be compared with the parent's: %s", partition.name, error)
            else:
                self._flow.do(self._follower.looked(event.line, [Point(*point) for point in points]))

        self._flow.begin()
        self._engine.chains(partition, event.offsets, done)

    def _cut(self, event: TruncateLog) -> None:
        partition, offset = self._engine.log(*event.line.key), event.offset
        assert partition is not None
        self._flow.begin()
        if partition.staged_end != partition.durable_end:
            self._retry(partition)
            return
        self._metrics.log_truncations += 1
        self._metrics.records_truncated += partition.durable_end - offset
        log.warning(
            "%s: diverged from the parent at %d; truncating %d records", partition.name, offset,
            partition.durable_end - offset,
        )  # fmt: skip

        def done(outcome: Outcome, message: str) -> None:
            if outcome is not Outcome.OK:
                log.error("%s; trying again", message)
            self._retry(partition)
            self._hooks.truncated(partition)  # also when it failed: the readers wait

        self._hooks.truncating(partition, offset, lambda: self._engine.truncate(partition, offset, done))

    def _restart(self, event: RecreateLog) -> None:
        partition = self._engine.log(*event.line.key)
        assert partition is not None
        self._flow.begin()
        if partition.staged_end != partition.durable_end:
            self._retry(partition)
            return
        self._metrics.logs_recreated += 1
        log.warning(
            "%s: the parent's log begins at %d, this node's ends at %d; going on there", partition.name, event.offset,
            partition.durable_end,
        )  # fmt: skip

        def further(old: Identity) -> Identity:
            snapshot = old.snapshot if old.snapshot[0] >= event.offset else (-1, -1)
            return replace(old, log_start=event.offset, chain=event.chain, snapshot=snapshot, gaps=[])

        self._engine.recreate(partition, further, partial(self._moved_on, partition))

    def _skip(self, event: SkipRecords) -> None:
        """Keep what this node has of the parent's history, and go on where the parent can."""
        partition = self._engine.log(*event.line.key)
        assert partition is not None
        end, offered = partition.staged_end, self._offered.get(partition.topic)
        epochs = offered.partitions[partition.partition].epochs if offered is not None else partition.identity.epochs
        same_history = replace(partition.identity, epochs=epochs).contains(partition.staged_epoch, end)
        if end == partition.log_start or not same_history or len(partition.identity.gaps) >= MAX_GAPS:
            self._restart(RecreateLog(event.line, event.offset, event.chain))
            return
        self._flow.begin()
        if end != partition.durable_end:
            self._retry(partition)
            return
        self._metrics.log_gaps += 1
        log.warning(
            "%s: the parent has removed records %d to %d before this node had them; going on behind them",
            partition.name, end, event.offset - 1,
        )  # fmt: skip
        self._engine.skip(partition, event.offset, event.chain, partial(self._moved_on, partition))

    def _moved_on(self, partition: Log, outcome: Outcome, message: str) -> None:
        """The log goes on at a later offset."""
        if outcome is not Outcome.OK:
            log.error("%s; trying again", message)
        self._retry(partition)
        if outcome is Outcome.OK:
            self._hooks.recreated(partition, False)

    def _retry(self, partition: Log) -> None:
        """Go on where the log ends, once everything that was taken is stored."""
        if self._flow.stopped:
            return
        if partition.staged_end != partition.durable_end:
            self._loop.call_later(STORED_SECONDS, lambda: self._retry(partition))
            return
        self.follow(partition)
        offered = self._offered.get(partition.topic)
        if offered is not None and offered.name not in self._changing:
            self._topic(offered)  # histories that the log was not of before
        self._flow.done()


def _replace_by(identity: Identity, old: Identity) -> Identity:
    return identity


def identity_of(info: TopicInfo, part: PartitionInfo) -> Identity:
    """The identity of a mirror that begins where its parent begins."""
    return Identity(
        log_id=part.log_id,
        origin=part.origin,
        epochs=part.epochs,
        log_start=part.log_start,
        chain=part.chain,
        settings=info.settings,
    )


def _superseded(info: TopicInfo, logs: list[Log]) -> bool:
    """True when the parent has the very logs that this node writes: in a newer history of another node, or in the one
    that this node took over when it was promoted, and has written nothing to since."""
    return len(logs) == len(info.partitions) and all(
        one.identity.log_id == part.log_id
        and part.origin != one.identity.origin
        and (part.epochs[-1][0] > one.identity.epoch or _wrote_nothing(part, one))
        for one, part in zip(logs, info.partitions, strict=True)
    )


def _wrote_nothing(part: PartitionInfo, partition: Log) -> bool:
    """True when the last history of a log was begun at its end, the others are the parent's, and all that is stored
    belongs to them: what the parent has begun since, it has begun no earlier."""
    *taken, (_, begun) = partition.identity.epochs
    end = partition.staged_end
    if not taken or begun < end or part.epochs[: len(taken)] != taken:
        return False
    return replace(partition.identity, epochs=part.epochs).contains(taken[-1][0], end)


def _epochs(part: PartitionInfo, partition: Log) -> list[tuple[int, int]]:
    """The histories to be told from now on: the parent's, but not while this log holds records that are not of them.
    Those are truncated first: else it would call its own children diverged, which have the same as it."""
    told = replace(partition.identity, epochs=part.epochs)
    empty = partition.staged_end == partition.log_start
    fits = empty or told.contains(partition.staged_epoch, partition.staged_end) or _wrote_nothing(part, partition)
    return part.epochs if fits else partition.identity.epochs


def _changing(info: TopicInfo, part: PartitionInfo, partition: Log) -> Callable[[Identity], Identity]:
    epochs = _epochs(part, partition)
    whole = part.snapshot[0] >= partition.log_start and partition.durable_end >= part.snapshot[1]
    same = partition.identity.log_id == part.log_id

    def change(old: Identity) -> Identity:
        if not same:
            return old
        snapshot = part.snapshot if whole else old.snapshot
        return replace(old, origin=part.origin, epochs=epochs, settings=info.settings, snapshot=snapshot)

    return change
