"""The topics of an application at its broker: one consumer for those of a scope that begin at the same place."""

from __future__ import annotations

import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from math import inf
from typing import NamedTuple

from edgebroker.client.consumer import Consumer
from edgebroker.client.refresh import Staging
from edgebroker.common.errors import AnswerError, Code, UnreachableError
from edgebroker.common.records import Record
from edgebroker.common.runtime.clock import Clock, sleep
from edgebroker.common.types import Delivery, Position, TopicPartition
from edgebroker.consumer.declare.application import Topic

log = logging.getLogger(__name__)

# What may be in flight.
WINDOW_RECORDS, WINDOW_BYTES = 1 << 20, 8 << 20
# An application works without its broker; so long after it went, and so often, the log says so.
AWAY_SECONDS, REMIND_SECONDS = 10.0, 300.0
ASK_SECONDS = 10.0


class Asked(NamedTuple):
    """The partitions of a topic that are loaded again, and those that cannot be; others are to be asked for."""

    loading: set[int]
    refused: set[int]


class Subscriptions:
    """Belongs to the thread that polls, but for what says otherwise. `lost` is told of partitions that are another
    member's from now on, `received` of what is delivered of topics that this instance has for itself."""

    def __init__(
        self,
        name: str,
        node: str,
        server: str,
        credentials: str,
        clock: Clock,
        lost: Callable[[Sequence[TopicPartition]], None],
        received: Callable[[Delivery], None] | None,
    ) -> None:
        self._received = received
        self._name, self._node, self._server, self._credentials, self._clock = name, node, server, credentials, clock
        self._lost, self._away_due = lost, 0.0
        self._topics: dict[Consumer, list[str]] = {}
        self._of_topic: dict[str, Consumer] = {}
        # Where each partition ended when it was given; when nothing was missing of a topic, in monotonic seconds.
        self._goals: dict[TopicPartition, int] = {}
        self._current: dict[str, float] = {}

    def open(self, topics: Iterable[Topic], positions: Mapping[tuple[str, int], Position], staging: Staging) -> None:
        """Begin to read topics. `positions` are those that are kept here."""
        kinds: dict[tuple[str, str], list[str]] = {}
        for topic in topics:
            kinds.setdefault((topic.scope, topic.start), []).append(topic.name)
        for (scope, start), names in kinds.items():
            own = {key: one for key, one in positions.items() if key[0] in names}
            consumer = Consumer(
                self._server,
                names,
                f"{self._name}.{self._node}" if scope == "each" else self._name,
                credentials=self._credentials,
                start="latest" if start == "latest" else "earliest",
                positions=own if scope == "each" else None,
                auto_ack=False,
                on_delivery=self._received if scope == "each" else None,
                on_revoked=self._lost,
                on_gap=lambda gap: log.warning("%s", gap),
                timeout=AWAY_SECONDS,
                staging=staging,
                window_records=WINDOW_RECORDS,
                window_bytes=WINDOW_BYTES,
            )
            self._topics[consumer] = names
            self._of_topic.update(dict.fromkeys(names, consumer))

    # ---- records ----

    @property
    def consumers(self) -> list[Consumer]:
        return list(self._topics)

    def poll(self, consumer: Consumer, wait: float) -> list[Record]:
        """The next records, [] after `wait` seconds, also when there is no broker or no such topic."""
        try:
            return consumer.poll(wait)
        except UnreachableError as error:
            now = self._clock.monotonic()
            if now >= self._away_due:
                self._away_due = now + REMIND_SECONDS
                log.warning("%s; what is here is served meanwhile", error)
            sleep(wait)
            return []
        except AnswerError as error:
            if error.code is not Code.UNKNOWN_TOPIC:
                raise
            log.warning("%s; what is here is served meanwhile, and it is waited for", error)
            return []

    def position_after(self, record: Record) -> Position:
        return self._of_topic[record.topic].position_after(record)

    def acknowledge(self, key: TopicPartition, next_offset: int) -> None:
        self._of_topic[key.topic].ack_to(*key, next_offset)

    def reject(self, record: Record, why: str) -> None:
        """Have the broker make a dead letter of it. What follows it comes again."""
        self._of_topic[record.topic].reject(record, why)

    def in_progress(self) -> None:
        for consumer in self._topics:
            consumer.in_progress()

    def close(self) -> None:
        for consumer in self._topics:
            consumer.close()

    # ---- loading again ----

    def held(self, topic: str) -> set[int]:
        """The partitions of a topic that are held now."""
        consumer = self._of_topic.get(topic)
        return {key.partition for key in consumer.assignment if key.topic == topic} if consumer is not None else set()

    def load_again(self, topic: str) -> Asked:
        """Ask for all partitions of a topic; those that are under way go on."""
        consumer, asked = self._of_topic[topic], Asked(set(), set())
        for partition in self.held(topic):
            try:
                consumer.refresh(topic, partition, timeout=ASK_SECONDS)
                asked.loading.add(partition)
            except (AnswerError, UnreachableError, TimeoutError) as error:
                if not isinstance(error, AnswerError) or error.code.retryable:
                    log.warning("%s/%d is asked for again in a moment: %s", topic, partition, error)
                    break
                log.warning("%s/%d stays as it is: %s", topic, partition, error)
                asked.refused.add(partition)
        return asked

    def announce_again(self, key: TopicPartition) -> None:
        """Have the broker announce the refresh of a partition again; what was received of it does not count."""
        if key.topic in self._of_topic:
            self._of_topic[key.topic].seek(key.topic, key.partition, "committed")

    def switch(self, topics: Sequence[str]) -> None:
        """Ask again whether what was loaded of these topics can be shown."""
        for consumer in {self._of_topic[topic] for topic in topics if topic in self._of_topic}:
            consumer.switch()

    # ---- how current it is ----

    def next_offsets(self) -> dict[TopicPartition, int]:
        """The next offset to be polled of each partition that is held."""
        return {key: offset for consumer in self._topics for key, offset in consumer.next_offsets().items()}

    def are_complete(self) -> bool:
        """Is everything there that the broker had when each partition was given?"""
        for consumer, topics in list(self._topics.items()):
            held = consumer.next_offsets()
            if {key.topic for key in held} != set(topics):
                return False
            for key, end in consumer.durable_ends.copy().items():
                self._goals.setdefault(key, end)
            if any(offset < self._goals.get(key, offset + 1) for key, offset in held.items()):
                return False
        return True

    def note_current(self, behind: Container[str]) -> None:
        """All that was handed out is stored: note of which topics nothing is missing, as far as the broker said so.
        What readers see of some is `behind`: they are being loaded."""
        now = self._clock.monotonic()
        for consumer, topics in list(self._topics.items()):
            heard, held, ends = now - consumer.silent_seconds, consumer.next_offsets(), consumer.durable_ends.copy()
            for topic in topics:
                if topic in behind:
                    continue
                own = [key for key in held if key.topic == topic]
                if heard > 0 and own and all(key in ends and held[key] >= ends[key] for key in own):
                    self._current[topic] = heard

    def age(self, topic: str) -> float | None:
        """Seconds since nothing was missing of a topic; None: that was not yet. Any thread."""
        current = self._current.get(topic)
        return max(0.0, self._clock.monotonic() - current) if current is not None else None

    def ends(self) -> dict[TopicPartition, int]:
        """Where the broker's logs end, as far as it has said so. Any thread."""
        return {key: end for consumer in list(self._topics) for key, end in consumer.durable_ends.copy().items()}

    @property
    def silent_seconds(self) -> float:
        """How long the broker has said nothing; infinite while it is not connected. Any thread."""
        return max((consumer.silent_seconds for consumer in list(self._topics)), default=inf)
