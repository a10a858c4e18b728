"""Clients at work while faults happen: writers and a follower in threads, and a broker whose faults can be switched.

with Traffic(broker, history, "orders", seed=1) as traffic:
    traffic.acked(100)
    broker.kill()
    broker.start()
    traffic.drain()  # everything acknowledged and followed to the end
"""

import logging
import random
import threading
from types import TracebackType

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer, Sent
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.common.runtime.clock import SystemClock
from tests.kit.waiting import wait_for

from .checker import Ack, ConsumerHistory, History, value_of

CLOCK = SystemClock()

# What every broker under faults is told: small segments, no free-space watermarks, a quick check after a start.
SETTINGS = {
    "EDGEBROKER_STORAGE_SEGMENT_BYTES": str(64 << 10),
    "EDGEBROKER_STORAGE_HARD_FREE_BYTES": "0",
    "EDGEBROKER_STORAGE_SOFT_FREE_BYTES": "0",
    "EDGEBROKER_TOPICS_PARTITIONS": "4",
}
PARTITIONS = 4

for _name in ("edgebroker.client.producer", "edgebroker.client.publish.sender", "edgebroker.client.link"):
    logging.getLogger(_name).setLevel(logging.ERROR)


def pass_time(seconds: float) -> None:
    """Let the others work for a while."""
    due = CLOCK.monotonic() + seconds
    wait_for(lambda: CLOCK.monotonic() >= due, "time passes", seconds + 10.0)


def send_value(history: History, producer: Producer, topic: str, partition: int, name: str, n: int, size: int) -> Sent:
    """Send value number n of a producer; its answer goes into the history."""

    def answered(sent: Sent) -> None:
        error = sent.exception(0)
        if error is not None:
            history.failed(error)
        else:
            history.acknowledged(Ack(topic, partition, sent.result(0), name, n, "durable"))

    history.sending(name, n)
    sent = producer.send(topic, value_of(name, n, size), partition=partition)
    sent.add_done_callback(answered)
    return sent


class Writer:
    """A thread that publishes unique values in small bursts and notes every answer."""

    def __init__(
        self,
        history: History,
        server: str,
        name: str,
        topic: str,
        *,
        seed: int,
        pause: float = 0.004,
        sizes: tuple[int, int] = (24, 600),
    ) -> None:
        self._history, self._name, self._topic = history, name, topic
        self._rng, self._pause, self._sizes = random.Random(seed), pause, sizes
        self._producer = Producer(server, client_id=f"writer-{name}", batch_records=20, timeout=90.0)
        self._stop = threading.Event()
        self.n = history.sent[name]
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            while not self._stop.wait(self._pause):
                last = None
                for _ in range(self._rng.randint(1, 20)):
                    last = self._send()
                while last is not None and not last.done() and not self._stop.wait(0.001):
                    pass
        except BaseException as error:
            self.error = error

    def _send(self) -> Sent:
        n, partition, size = self.n, self._rng.randrange(PARTITIONS), self._rng.randint(*self._sizes)
        self.n += 1
        return send_value(self._history, self._producer, self._topic, partition, self._name, n, size)

    def stop(self, timeout: float = 30.0) -> None:
        """No more sends; wait for the answers to what was sent."""
        self._stop.set()
        self._thread.join(timeout)
        self._producer.close(timeout)
        if self.error is not None:
            raise self.error

    def drop(self) -> None:
        """End at once: what is not answered stays unknown."""
        self._stop.set()
        self._producer.close(0.0)
        self._thread.join(5.0)


class Follower:
    """A thread that consumes as a group, acknowledges, and now and then waits until that is stored.

    It acknowledges somewhere in the middle of what came, or not at all, and all of it when nothing more comes: what is
    left over would be held against it after the delivery timeout.
    """

    def __init__(self, history: ConsumerHistory, server: str, topic: str, *, seed: int) -> None:
        self.history = history
        self._rng = random.Random(seed)
        self._consumer = Consumer(
            server,
            [topic],
            history.group,
            auto_ack=False,
            client_id=f"c-{history.group}",
            on_gap=lambda gap: history.gap(gap.partition, gap.first, gap.last, gap.reason),
        )
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                records = self._consumer.poll(0.1)
                for record in records:
                    self.history.saw(record.partition, record.offset, record.value or b"")
                if records and self._rng.random() < 0.9:
                    upto = records[self._rng.randrange(len(records))]
                    self.history.acknowledged(upto.partition, upto.offset + 1)
                    self._consumer.ack(upto)
                for key, offset in self._consumer.next_offsets().items() if not records else ():
                    if offset > self.history.acked[key.partition]:
                        self.history.acknowledged(key.partition, offset)
                        self._consumer.ack_to(*key, offset)
                if self._rng.random() < 0.05:
                    self._commit(0.5)
            except EdgeBrokerError as error:
                self.history.problems.append(f"group {self.history.group}: {error!r}")
                return

    def _commit(self, timeout: float) -> None:
        ends = dict(self.history.acked)
        try:
            self._consumer.commit(timeout)
        except TimeoutError:
            return
        self.history.confirmed(ends)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join(10.0)
        self._consumer.close()


class Traffic:
    """Writers and one follower on a topic; a context manager that lets go of them without waiting on an error."""

    def __init__(
        self, broker: BrokerProcess, history: History, topic: str, *, seed: int, writers: int = 2, pause: float = 0.004
    ) -> None:
        self._broker, self._history, self._topic = broker, history, topic
        if topic not in [line["name"] for line in call(broker.admin, "GET", "/v1/topics")["topics"]]:
            call(broker.admin, "POST", "/v1/topics", {"name": topic, "partitions": PARTITIONS})
        group = ConsumerHistory("followers")
        if not any(consumer.group == group.group for consumer in history.consumers):
            history.consumers.append(group)
        self.writers = [
            Writer(history, broker.server, f"p{rank}", topic, seed=seed * 10 + rank, pause=pause)
            for rank in range(writers)
        ]
        self.follower = Follower(history.consumers[0], broker.server, topic, seed=seed)

    def acked(self, more: int, seconds: float = 15.0) -> float:
        """Wait for this many further acknowledgements."""
        wanted = len(self._history.acks) + more
        return wait_for(lambda: len(self._history.acks) >= wanted, f"{more} further acknowledgements", seconds)

    def drain(self) -> None:
        """Stop writing, wait for every answer, let the follower see everything, then end it."""
        for writer in self.writers:
            writer.stop()
        parts = call(self._broker.admin, "GET", f"/v1/topics/{self._topic}")["partitions"]
        ends = {part["partition"]: part["durable_end"] for part in parts if part["durable_end"] > part["log_start"]}
        history = self.follower.history

        def behind() -> dict[int, tuple[int | None, int]]:
            seen = history.next_offset
            return {p: (seen.get(p), end) for p, end in ends.items() if seen.get(p, -1) < end}

        try:
            wait_for(lambda: not behind() or bool(history.problems), "the follower comes to the end", 20.0)
        except TimeoutError as error:
            groups = call(self._broker.admin, "GET", f"/v1/groups/{history.group}")
            raise TimeoutError(f"{error}: {behind()}, {groups}") from None
        self.follower.stop()

    def __enter__(self) -> "Traffic":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for writer in self.writers:
            writer.drop()
        self.follower.stop()
