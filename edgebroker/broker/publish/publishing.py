"""From a publish to its acknowledgement: the one way into a log.

    submit() -> engine.append (staged) -> ... commit thread ... -> on_written / on_durable -> Publisher.answered()
    replicated: ... -> on_durable -> children get it, and confirm() that they have it durably -> Publisher.answered()

Answers of one partition and ack level leave in the order in which the publishes came; refusals may overtake them.
Compressed batches are inflated and checked by the checker thread first; meanwhile the publisher reads no further. Above
the high watermark of what waits for the disk, publishing sessions are not read until it is below the low one.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from edgebroker.broker.observe.limits import ReachedLimits
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.ports import Publisher
from edgebroker.broker.publish.compressed import check_compressed
from edgebroker.broker.publish.confirmations import Confirmations
from edgebroker.common import answers as packed
from edgebroker.common.batch import STORED_BATCH_BYTES, Reason
from edgebroker.common.errors import Code
from edgebroker.common.messages import PublishRun
from edgebroker.common.names import SNAPSHOT_CLIENTS, check_topic_name, is_own
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.runtime.threads import Worker
from edgebroker.common.spans import ANSWER, SPAN, pack_span, payload_bytes
from edgebroker.common.types import AckLevel, TopicSettings
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.log import segscan

EXPIRE_SECONDS = 0.25
# So long a log takes no records when a child says that it has more of it.
CLAIM_SECONDS = 5.0
# So long a log that was restored from a copy waits for children that may have more of it.
COMPARE_SECONDS = 30.0

_logger = logging.getLogger(__name__)


class Waiting(NamedTuple):
    """A run whose answers are true once the log's end has passed `wait`. `until`: when it is refused instead, for want
    of nodes that have it."""

    wait: int
    publisher: Publisher
    spans: bytes
    answers: bytes
    size: int
    level: AckLevel
    until: float


class Lost(NamedTuple):
    """What an origin lost of a log: up to where a child has it, the chain there, and what is said about it."""

    end: int
    chain: int
    why: str


class PublishLimits(NamedTuple):
    """Bytes that may wait for the disk before publishers are held, and before they are let go on."""

    high_bytes: int
    low_bytes: int
    max_record: int
    max_inflated: int
    max_partitions: int
    auto_create: bool
    follows: bool
    """The node has a parent, from which its topics come."""
    replicated_seconds: float
    """Time for nodes below to have what they are waited for."""
    new_topics: TopicSettings


class Publishing:
    """Owned by the loop thread."""

    def __init__(
        self, engine: Engine, scheduler: Scheduler, metrics: Metrics, reached: ReachedLimits, limits: PublishLimits
    ) -> None:
        self._engine, self._scheduler, self._metrics, self._limits = engine, scheduler, metrics, limits
        self._reached = reached
        self._checker: Worker | None = None
        self._durable: dict[Log, deque[Waiting]] = {}
        self._written: dict[Log, deque[Waiting]] = {}
        self._replicated: dict[Log, deque[Waiting]] = {}
        self._confirmations = Confirmations()
        # Asks the children how much of a log they have durably.
        self.ask_children: Callable[[Log], None] = lambda log: None
        self._expiring = False
        self._held: dict[Publisher, None] = {}
        self._exclusive: dict[Log, str] = {}
        # Logs of this node of which it lost acknowledged records, and what is known about it.
        self.lost: dict[Log, Lost] = {}
        # Logs of which a child said that it has more, and until when it can show it.
        self._claims: dict[Log, float] = {}
        # Until when a log that was restored from a copy takes no records.
        self.compared_at = 0.0
        # Logs that a promoted node writes instead, and its name.
        self.fenced: dict[Log, str] = {}
        # How an operator finds a node, by its uid.
        self.name_of: Callable[[str], str] = lambda uid: f"node {uid}"
        self.waiting_bytes = 0
        self.draining = False

    def submit(self, publisher: Publisher, run: PublishRun, *, inflated: bool = False, internal: bool = False) -> None:
        """Handle a run of publishes. For what has to wait (a topic that is created, compressed batches at the checker)
        the data is copied, and the publisher held meanwhile.

        `internal`: the broker itself publishes, to a topic that clients cannot write to.
        """
        log = self._engine.log(run.topic, run.partition)
        if log is None:
            self._without_log(publisher, run)
            return
        # Who writes a snapshot may take what others leave: that is what makes room.
        spare = bool(self._exclusive) and self._exclusive.get(log) == publisher.client_id
        refusal = self._engine.refusal(spare=spare)
        if self.draining:
            refusal = (Outcome.SHUTTING_DOWN, "this node is stopping; connect again in a moment")
        if log.identity.origin != self._engine.node_uid:
            writer = self.name_of(log.identity.origin)
            refusal = (Outcome.NOT_ORIGIN, f"{log.name} is written by {writer} only; publish there")
        if not internal and is_own(run.topic):
            refusal = (Outcome.NOT_FOUND, check_topic_name(run.topic))
        elif self._exclusive and self._exclusive.get(log, publisher.client_id) != publisher.client_id:
            refusal = (Outcome.OVERLOADED, f"a snapshot is being written to {log.name}; try again in a moment")
        elif publisher.client_id.startswith(SNAPSHOT_CLIENTS) and self.reserved(log) != publisher.client_id:
            refusal = (Outcome.FENCED, f"the snapshot of {run.topic} is not under way any more; begin it again")
        elif self.lost and log in self.lost:
            refusal = (Outcome.HISTORY_LOST, self.lost[log].why)
        elif self.compared_at and self._is_compared(log):
            why = f"{log.name} was restored from a copy; its children are asked first what they have; try again soon"
            refusal = (Outcome.OVERLOADED, why)
        elif self._claims and self._is_claimed(log):
            why = f"a child says that it has more of {log.name} than this node, and is asked to show it; try again soon"
            refusal = (Outcome.OVERLOADED, why)
        elif self.fenced and log in self.fenced:
            why = f"{log.name} is written by node {self.fenced[log]} now, which was promoted; publish there"
            refusal = (Outcome.NOT_ORIGIN, why)
        if refusal is not None:
            self._refuse_all(publisher, run, *refusal)
            return
        level = AckLevel(run.level)
        appended = self._engine.append(log, run.data, run.spans, level, inflated, publisher.producer_id)
        self._metrics.publish_frames += appended.frames
        self._metrics.records_published += appended.records
        handled, rest = run.spans[: appended.frames * SPAN.size], run.spans[appended.frames * SPAN.size :]
        if handled:
            self._await(publisher, log, run._replace(spans=handled), appended.answers, appended.wait, level)
        if rest:
            self._inflate(publisher, run._replace(data=memoryview(bytearray(run.data)), spans=rest))

    def _inflate(self, publisher: Publisher, run: PublishRun) -> None:
        """Check the compressed batches of a run on the checker thread, then append it."""
        publisher.hold()
        max_inflated, max_record = self._limits.max_inflated, self._limits.max_record

        found: list[tuple[bytes, list[tuple[int, Reason, str]]]] = []

        def check() -> None:
            found.append(check_compressed(run.data, run.spans, max_inflated, max_record))

        def finish() -> None:
            good, bad = found[0]
            self._metrics.publish_frames += len(bad)
            for correlation, reason, why in bad:
                self._count_refused(reason.code, 1)
                if run.level != AckLevel.NONE:
                    publisher.rejected(pack_span(correlation, 0, 0), reason.code, why)
            if good:
                self.submit(publisher, run._replace(spans=good), inflated=True)
            publisher.release()

        self.check(check, finish)

    def check(self, work: Callable[[], None], done: Callable[[], None]) -> None:
        """Run something that inflates or decodes on the checker thread, then done on the loop."""
        if self._checker is None:
            self._checker = Worker("checker")

        def run() -> None:
            work()
            self._scheduler.call_soon_threadsafe(done)

        self._checker.submit(run)

    def compare_restored(self) -> None:
        """This node starts: logs that were restored from a copy take no records for a while."""
        if any(log.identity.restored for log in self._engine.logs()):
            self.compared_at = self._scheduler.now() + COMPARE_SECONDS

    def _is_compared(self, log: Log) -> bool:
        """Do children have the time to say what they have of a log?"""
        if self._scheduler.now() >= self.compared_at:
            self.compared_at = 0.0
        return self.compared_at > 0 and log.identity.copied(log.durable_end) is not log.identity

    def no_room(self, topic: str, partitions: int) -> str:
        """Why clients cannot create this topic; "" when they can. What comes from the parent is not limited."""
        most = self._limits.max_partitions
        if sum(1 for _ in self._engine.logs()) + partitions <= most:
            return ""
        self._reached.reached("max_partitions", f"topic {topic} was not created")
        return (
            f"topic {topic} cannot be created: this node may have {most} partitions; delete topics that have no use, "
            "or raise limits.max_partitions"
        )

    def reserve(self, log: Log, client_id: str) -> None:
        """Only this client may publish to a log, until free()."""
        self._exclusive[log] = client_id

    def claimed(self, log: Log, end: int, chain: int, beyond: bytes) -> None:
        """Another node says that it has records of this log up to `end` (with that chain before it), which this node,
        its origin, lost. It is believed when it shows the batch behind the end of this node, and that one fits; until
        then nothing is published over it, for a few seconds, once in a run: anybody can say so."""
        if _fits(log, end, chain, beyond):
            self._claims[log] = 0.0
            self._history_lost(log, end, chain)
        elif log not in self._claims and log not in self.lost:
            self._claims[log] = self._scheduler.now() + CLAIM_SECONDS
            _logger.warning("%s: a child says that it has it up to %d, and is asked to show it", log.name, end)

    def _is_claimed(self, log: Log) -> bool:
        """Does a child have the time to show what it has beyond the end of a log?"""
        return self._scheduler.now() < self._claims.get(log, 0.0)

    def _history_lost(self, log: Log, end: int, chain: int) -> None:
        """Acknowledged records are gone here: publish nothing over them."""
        known = self.lost.get(log)
        if known is None or known.end < end:
            why = (
                f"{log.name} ends at {log.durable_end}, but a child has it up to {end}: acknowledged records were lost "
                "here; fetch them with: edgebroker repair --from CHILD, or accept the loss with: "
                f"edgebroker topic accept {log.topic}"
            )
            self.lost[log] = Lost(end, chain, why)
            self._metrics.refused(Code.HISTORY_LOST.name)
            _logger.critical("%s", why)

    def loss_accepted(self, log: Log) -> None:
        self.lost.pop(log, None)

    def deleted(self, log: Log) -> None:
        """Nothing is known about a log any more."""
        self._confirmations.forget(log)
        self.lost.pop(log, None)
        self._claims.pop(log, None)
        self.fenced.pop(log, None)

    def free(self, log: Log) -> None:
        self._exclusive.pop(log, None)

    def reserved(self, log: Log) -> str:
        """Who alone may publish to a log; "" when everybody may."""
        return self._exclusive.get(log, "")

    # ---- the engine's word ----

    def on_written(self, log: Log) -> None:
        self._release(self._written.get(log), log.written_end)

    def on_durable(self, log: Log) -> None:
        self._release(self._durable.get(log), log.durable_end)
        self._release(self._written.get(log), log.durable_end)
        if self._held and self.waiting_bytes <= self._limits.low_bytes:
            held, self._held = self._held, {}
            for publisher in held:
                publisher.release()

    def on_failed(self, log: Log, outcome: Outcome, message: str) -> None:
        """Everything that is not in the log any more is answered with a code."""
        for queue in (queues.get(log) for queues in (self._durable, self._written, self._replicated)):
            kept = [waiting for waiting in queue or () if waiting.wait <= log.written_end]
            gone = [waiting for waiting in queue or () if waiting.wait > log.written_end]
            if queue is not None:
                queue.clear()
                queue.extend(kept)
            for waiting in gone:
                self._fail(waiting, outcome.code)
        self.on_durable(log)

    # ---- what nodes below have ----

    def waits_for_children(self, log: Log) -> bool:
        """Does a publish wait until nodes below have it?"""
        return bool(self._replicated and self._replicated.get(log))

    def confirm(self, log: Log, uid: str, name: str, offset: int) -> None:
        """A child has everything of a log before `offset`, durably."""
        if self.waits_for_children(log):
            self._confirmations.confirm(log, uid, name, offset)
            self._release(self._replicated[log], self._replicated_end(log))

    def _replicated_end(self, log: Log) -> int:
        return min(log.durable_end, self._confirmations.end(log))

    def _expire(self) -> None:
        """Refuse what nodes below did not have in time: it is stored here, and may be published again."""
        now = self._scheduler.now()
        for queue in self._replicated.values():
            while queue and queue[0].until <= now:
                self._fail(queue.popleft(), Code.NOT_REPLICATED)
        self._replicated = {log: queue for log, queue in self._replicated.items() if queue}
        self._expiring = bool(self._replicated)
        if self._expiring:
            self._scheduler.call_later(EXPIRE_SECONDS, self._expire)

    def _fail(self, waiting: Waiting, code: Code) -> None:
        refused = packed.refuse(waiting.answers, code)
        self._count_refused(code, packed.failed(refused))
        self._answer(waiting, refused)

    # ---- inside ----

    def _await(
        self, publisher: Publisher, log: Log, run: PublishRun, answers: bytes, wait: int, level: AckLevel
    ) -> None:
        size = payload_bytes(run.spans)
        waiting = Waiting(
            wait, publisher, run.spans, answers, size, level, self._scheduler.now() + self._limits.replicated_seconds
        )
        self.waiting_bytes += size
        self._metrics.bytes_published += size
        failures = packed.failed(answers)
        if failures:
            self._note_failures(answers)
        if level == AckLevel.REPLICATED:
            end, queues = self._replicated_end(log), self._replicated
        elif level == AckLevel.WRITTEN:
            end, queues = log.written_end, self._written
        else:
            end, queues = log.durable_end, self._durable
        queue = queues.get(log)
        if wait <= end and not queue:
            self._answer(waiting, answers)
            return
        if queue is None:
            queue = queues[log] = deque()
        queue.append(waiting)
        if level == AckLevel.REPLICATED:
            if wait <= log.durable_end:
                self.ask_children(log)  # published again: the children may have it already
            if not self._expiring:
                self._expiring = True
                self._scheduler.call_later(EXPIRE_SECONDS, self._expire)
        if self.waiting_bytes > self._limits.high_bytes and publisher not in self._held:
            self._held[publisher] = None
            publisher.hold()

    def _release(self, queue: deque[Waiting] | None, end: int) -> None:
        while queue and queue[0].wait <= end:
            waiting = queue.popleft()
            self._answer(waiting, waiting.answers)

    def _answer(self, waiting: Waiting, answers: bytes) -> None:
        self.waiting_bytes -= waiting.size
        if waiting.level != AckLevel.NONE:
            waiting.publisher.answered(waiting.spans, answers)

    def _without_log(self, publisher: Publisher, run: PublishRun) -> None:
        """Create a topic at its first PUBLISH, or say why not."""
        existing = self._engine.partitions(run.topic)
        if existing:
            why = f"{run.topic} has {len(existing)} partitions, there is no {run.partition}"
            self._refuse_all(publisher, run, Outcome.NOT_FOUND, why)
            return
        problem = check_topic_name(run.topic)
        if not problem and not self._limits.auto_create:
            where = "is not here, and not at the parent of this node yet" if self._limits.follows else "does not exist"
            own = ", to be written at this node" if self._limits.follows else ""
            problem = f"topic {run.topic} {where}; create it{own} with: edgebroker topic create {run.topic}"
        if problem or run.partition >= self._limits.new_topics.partitions:
            self._refuse_all(
                publisher, run, Outcome.NOT_FOUND, problem or f"{run.topic} has no partition {run.partition}"
            )
            return
        problem = self.no_room(run.topic, self._limits.new_topics.partitions)
        if problem:
            self._refuse_all(publisher, run, Outcome.OVERLOADED, problem)
            return
        copy = run._replace(data=memoryview(bytearray(run.data)))
        publisher.hold()

        def created(outcome: Outcome, message: str) -> None:
            if outcome in (Outcome.OK, Outcome.NAME_CLASH):
                self.submit(publisher, copy)
            else:
                self._refuse_all(publisher, copy, outcome, message)
            publisher.release()

        self._engine.create_topic(run.topic, self._limits.new_topics, created)

    def _refuse_all(self, publisher: Publisher, run: PublishRun, outcome: Outcome, message: str) -> None:
        count = len(run.spans) // SPAN.size
        self._metrics.publish_frames += count
        self._count_refused(outcome.code, count)
        if run.level != AckLevel.NONE:
            publisher.refused(run.spans, outcome, message)

    def _note_failures(self, answers: bytes) -> None:
        for _, code, _ in ANSWER.iter_unpack(answers):
            if code:
                self._count_refused(Code(code), 1)

    def _count_refused(self, code: Code, count: int) -> None:
        self._metrics.publish_refused += count
        self._metrics.refused(code.name, count)

    def stop(self) -> None:
        if self._checker is not None:
            self._checker.stop(1.0)


def _fits(log: Log, end: int, chain: int, beyond: bytes) -> bool:
    """Is this the batch behind the end of a log, as a node has it that has the log up to `end`?"""
    first, first_chain = log.durable_end, log.chain_at(log.durable_end)
    if not beyond or first_chain is None:
        return False
    good, _, following, reached = segscan.scan(beyond, first, first_chain, 0, STORED_BATCH_BYTES)[:4]
    return good == len(beyond) and following <= end and (following < end or reached == chain)
