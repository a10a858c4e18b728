"""Dead letters: a record that could not be handled goes, durably, into <topic>.dlq of this node.

    read the batch (reader thread) -> decode the one record and encode the dead letter (checker thread) -> publish it

The dead letter is the record with its key, value, timestamp and headers, and behind those the headers of HEADERS. It
may be written twice when the power goes between it and the committed offset: topic, partition, offset and group tell.
"""

from __future__ import annotations

from typing import NamedTuple

from edgebroker.broker.publish.own import publish_own
from edgebroker.broker.publish.publishing import Publishing
from edgebroker.common import batch, records
from edgebroker.common.errors import CorruptBatchError
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.records import BatchBuilder
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.types import DEAD_LETTERS, TopicSettings
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
            publish_own(self._publishing, "dead letters", topic, dead_letter, done)

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
