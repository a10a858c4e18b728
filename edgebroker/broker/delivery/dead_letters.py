"""Dead letters: a record that could not be handled goes, durably, into <topic>.dlq of this node.

    read the batch (reader thread) -> decode the one record and encode the dead letter (checker thread) -> publish it

The dead letter is the record with its key, value, timestamp and headers, and behind those the headers of HEADERS. It
may be written twice when the power goes between it and the committed offset: topic, partition, offset and group tell.
"""

from __future__ import annotations

from typing import NamedTuple

from edgebroker.broker.publish.publishing import Publishing
from edgebroker.common import batch, records
from edgebroker.common.batch import EXPLANATION, Reason
from edgebroker.common.errors import Code, CorruptBatchError
from edgebroker.common.messages import PublishRun
from edgebroker.common.outcome import Done, Outcome, outcome_of
from edgebroker.common.records import BatchBuilder
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.spans import ANSWER, pack_span
from edgebroker.common.types import DEAD_LETTERS, AckLevel, TopicSettings
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.types import ColdRead

HEADERS = (
    "eb-dlq-topic", "eb-dlq-partition", "eb-dlq-offset", "eb-dlq-group", "eb-dlq-attempts", "eb-dlq-reason",
    "eb-dlq-time",
)  # fmt: skip


class Failure(NamedTuple):
    """What is said about a record: which group could not handle it, after how many attempts, and why."""

    group: str
    attempts: int
    reason: str


class _DeadLetter:
    """The publisher of one dead letter."""

    client_id = "dead letters"
    producer_id = -1

    def __init__(self, done: Done) -> None:
        self._done = done

    def answered(self, spans: bytes, answers: bytes) -> None:
        _, code, reason = ANSWER.unpack(answers)
        if code == Code.OK:
            self._done(Outcome.OK, "")
        else:
            self._done(outcome_of(Code(code)), EXPLANATION.get(Reason(reason), "it was not stored"))

    def refused(self, spans: bytes, outcome: Outcome, why: str) -> None:
        self._done(outcome, why)

    def rejected(self, spans: bytes, code: int, why: str) -> None:
        self._done(outcome_of(Code(code)), why)

    def hold(self) -> None:
        """One record is not a flood."""

    def release(self) -> None:
        """It was not held."""


class DeadLetters:
    """Owned by the loop thread."""

    def __init__(self, engine: Engine, publishing: Publishing, clock: Clock) -> None:
        self._engine, self._publishing, self._clock = engine, publishing, clock

    def write(self, source: Log, offset: int, failure: Failure, done: Done) -> None:
        """Make a dead letter of one record; done(OK, "") once it is durable, done(OK, why) when no record is left."""

        def read(result: ColdRead) -> None:
            if result.corrupt is not None and source.settings.on_damage == "skip":
                done(Outcome.OK, "it is damaged, and on_damage is skip")
                return
            if result.error or result.corrupt is not None:
                done(result.refusal, result.error or "the record is damaged")
                return
            found: list[bytes | str] = []

            def encode() -> None:
                try:
                    found.append(make_dead_letter(result.data, source, offset, failure, self._clock.wall_ms()))
                except CorruptBatchError as error:
                    found.append(str(error))

            def encoded() -> None:
                dead_letter = found[0]
                if isinstance(dead_letter, str) and source.settings.on_damage == "skip":
                    done(Outcome.OK, f"it cannot be decoded ({dead_letter}), and on_damage is skip")
                elif isinstance(dead_letter, str):
                    done(
                        Outcome.CORRUPT,
                        f"it cannot be decoded ({dead_letter}); set on_damage = skip for the topic to pass it",
                    )
                elif not dead_letter:
                    done(Outcome.OK, "there is no record any more")
                else:
                    self._publish(source.topic + DEAD_LETTERS, dead_letter, done)

            self._publishing.check(encode, encoded)

        self._engine.read_cold(source, offset, 1, read)

    def _publish(self, topic: str, dead_letter: bytes, done: Done) -> None:
        def created(outcome: Outcome, message: str) -> None:
            if outcome not in (Outcome.OK, Outcome.NAME_CLASH):
                done(outcome, message)
                return
            run = PublishRun(AckLevel.DURABLE, topic, 0, memoryview(dead_letter), pack_span(1, 0, len(dead_letter)))
            self._publishing.submit(_DeadLetter(done), run, internal=True)

        if self._engine.log(topic, 0) is not None:
            created(Outcome.OK, "")
        else:
            self._engine.create_topic(topic, TopicSettings(), created)


def make_dead_letter(data: bytes, source: Log, offset: int, failure: Failure, wall_ms: int) -> bytes:
    """The batch that holds the dead letter of one record; b"" when no record is at the offset. CorruptBatchError."""
    header = batch.read_header(data)
    found = batch.decode(data[: header.size], source.topic, source.partition, offset, offset)
    if not found:
        return b""
    record = found[0]
    said = (source.topic, source.partition, offset, failure.group, failure.attempts, failure.reason, wall_ms)
    headers = [*record.headers, *((name, str(value).encode()) for name, value in zip(HEADERS, said, strict=True))]
    builder = BatchBuilder()
    builder.append(record.value, record.key, record.timestamp, *records.encode_headers(headers))
    return builder.build()
