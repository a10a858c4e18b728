"""Small disks filled up, and one that turns read-only: the node starts, reads, refuses with a reason, resumes."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.errors import AnswerError, EdgeBrokerError
from tests.kit.waiting import wait_for

from .checker import ConsumerHistory, History, check_groups, read_back
from .powercut import Disk, unavailable
from .traffic import SETTINGS, send_value

REASON = unavailable()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON or "available"), pytest.mark.slow]

TOPIC, GROUP, FILLER = "orders", "readers", "filler"
DISK_BYTES = 24 << 20
# The producer asks again after at most two seconds.
RESUME_SECONDS = 5.0 + 2.0


class Small:
    """A broker on a small disk, and a client that knows what it was told."""

    def __init__(self, disk: Disk) -> None:
        self.disk, self.history = disk, History()
        self.consumed = ConsumerHistory(GROUP)
        self.history.consumers.append(self.consumed)
        self.broker = BrokerProcess(disk.mount, settings=SETTINGS)
        self.n = 0

    def fill(self) -> None:
        """Take every free block."""
        for piece in (1 << 20, 64 << 10, 4096, 512, 1):
            with (self.disk.mount / FILLER).open("ab", buffering=0) as file:
                try:
                    while file.write(bytes(piece)) == piece:
                        os.fsync(file.fileno())
                except OSError:
                    pass

    def free(self) -> None:
        (self.disk.mount / FILLER).unlink()

    def create(self) -> None:
        call(self.broker.admin, "POST", "/v1/topics", {"name": TOPIC})

    def send(self, producer: Producer, count: int, size: int = 3000) -> None:
        for _ in range(count):
            n, self.n = self.n, self.n + 1
            send_value(self.history, producer, TOPIC, 0, "p", n, size)

    def refused(self, producer: Producer, code: str) -> None:
        """Wait until the producer was told this code."""

        def told() -> bool:
            error = producer._sender._last_error
            return isinstance(error, AnswerError) and error.code.name == code

        wait_for(told, f"publishing is answered {code}", 10.0)

    def consume(self, *, commit: bool) -> None:
        """Read to the end as the group; with `commit` wait until that is stored."""
        end = call(self.broker.admin, "GET", f"/v1/topics/{TOPIC}")["partitions"][0]["durable_end"]
        with Consumer(self.broker.server, [TOPIC], GROUP, auto_ack=False) as consumer:

            def at_the_end() -> bool:
                for record in consumer.poll(0.05):
                    self.consumed.saw(0, record.offset, record.value or b"")
                    self.consumed.acknowledged(0, record.offset + 1)
                    consumer.ack(record)
                return self.consumed.next_offset.get(0, 0) >= int(end)

            wait_for(at_the_end, "consumers go on", 10.0)
            if commit:
                consumer.commit(10.0)
                self.consumed.confirmed({0: end})

    def check(self, context: str) -> None:
        content = read_back(self.broker, TOPIC)
        self.history.check(TOPIC, content, context)
        check_groups(self.broker, self.history, TOPIC, content, context)

    def problems(self) -> dict[str, str]:
        found: dict[str, str] = call(self.broker.admin, "GET", "/v1/node")["problems"]
        return found


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    with Disk(tmp_path / "disk", size=DISK_BYTES) as disk:
        node = Small(disk)
        yield node
        node.broker.kill()


def test_a_disk_that_fills_up_and_is_freed(small: Small) -> None:
    small.broker.start()
    small.create()
    with Producer(small.broker.server, client_id="p", timeout=60.0) as producer:
        small.send(producer, 50)
        producer.flush(10.0)
        small.consume(commit=True)
        small.fill()
        while not isinstance(producer._sender._last_error, AnswerError):
            small.send(producer, 100)
            try:
                producer.flush(0.3)
            except TimeoutError:
                break
        small.refused(producer, "DISK_FULL")
        small.consume(commit=False)
        assert "read_only" not in small.problems()
        small.free()
        producer.flush(RESUME_SECONDS)
        wait_for(lambda: not small.problems(), "the node is well again", 5.0)
        small.consume(commit=True)
    assert small.broker.stop() == 0
    small.broker.start()
    small.check("after the disk was full")


def test_a_start_on_a_full_disk(small: Small) -> None:
    """meta.db, offsets.snap and every file of a start find no block; after a kill -9, too."""
    small.broker.start()
    small.create()
    with Producer(small.broker.server, client_id="p") as producer:
        small.send(producer, 200)
    small.consume(commit=True)
    for crash in (False, True):
        small.fill()
        if crash:
            small.broker.kill()
        else:
            small.broker.stop()
        small.fill()
        assert os.statvfs(small.disk.mount).f_bavail == 0
        small.broker.start()
        small.check(f"started on a full disk, crash: {crash}")
        with Producer(small.broker.server, client_id=f"p{crash}", timeout=60.0) as producer:
            small.fill()
            small.send(producer, 100)
            small.refused(producer, "DISK_FULL")
            small.consume(commit=False)
            small.free()
            producer.flush(RESUME_SECONDS)
        small.consume(commit=True)
    small.check("freed")
    assert small.broker.stop() == 0


def test_a_first_start_on_a_full_disk(small: Small) -> None:
    """Nothing is stored yet and nothing can be: it says so, and starts as soon as there is space."""
    small.fill()
    with pytest.raises(EdgeBrokerError, match="No space left"):
        small.broker.start()
    assert small.broker.process is not None
    assert small.broker.process.returncode == 1
    small.free()
    small.broker.start()
    small.create()
    with Producer(small.broker.server, client_id="p") as producer:
        small.send(producer, 20)
    small.check("the first start found no space")


def test_a_file_system_that_turns_read_only(small: Small) -> None:
    small.broker.start()
    small.create()
    with Producer(small.broker.server, client_id="p", timeout=60.0) as producer:
        small.send(producer, 50)
        producer.flush(10.0)
        small.consume(commit=True)
        before = call(small.broker.admin, "GET", f"/v1/topics/{TOPIC}")["partitions"][0]["durable_end"]
        assert small.broker.process is not None
        # With files open for writing a remount is refused; an aborted journal is what a dying disk brings about.
        small.disk.abort()
        small.send(producer, 200)
        small.refused(producer, "READ_ONLY")
        small.consume(commit=False)
        after = call(small.broker.admin, "GET", f"/v1/topics/{TOPIC}")["partitions"][0]["durable_end"]
        assert after >= before
        producer.close(0.0)
    small.broker.kill()
    small.disk.detach()
    small.disk.attach()
    small.broker.start()
    small.check("after the file system was read-only")
    assert small.broker.stop() == 0
