"""Time to live while the wall clock jumps: nothing expires early; with a right clock whole batches do."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.errors import GapError
from tests.kit.waiting import wait_for

from .test_clock import _LIBRARIES, YEAR, set_clock
from .traffic import CLOCK, SETTINGS

pytestmark = [pytest.mark.skipif(not _LIBRARIES, reason="libfaketime is not installed"), pytest.mark.slow]

TOPIC = "ticks"
HOUR = 3600
SECONDS = 20.0
TTL_MS = HOUR * 1000
WAVE = 100


class Node:
    """A broker whose wall clock is turned by the test, and one topic with a time to live."""

    def __init__(self, directory: Path) -> None:
        self.clock = directory / "clock"
        set_clock(self.clock, "+0")
        environment = {
            "LD_PRELOAD": str(_LIBRARIES[0]),
            "FAKETIME_TIMESTAMP_FILE": str(self.clock),
            "FAKETIME_NO_CACHE": "1",
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }
        settings = SETTINGS | {"EDGEBROKER_LOG_LEVEL": "error"}
        self.broker = BrokerProcess(directory / "data", settings=settings, environment=environment)
        self.n = 0

    def create(self, ttl_ms: int) -> None:
        call(self.broker.admin, "POST", "/v1/topics", {"name": TOPIC, "message_ttl_ms": ttl_ms})

    def publish(self, count: int) -> None:
        """Enough bytes to seal a segment now and then."""
        with Producer(self.broker.server, client_id=f"p{self.n}", batch_records=10, timeout=30.0) as producer:
            for _ in range(count):
                producer.send(TOPIC, b"%d" % self.n + b"." * 1500, partition=0)
                self.n += 1
            producer.flush(SECONDS)

    def read(self) -> tuple[list[int], list[tuple[int, int, str]]]:
        """(numbers of the records that come, gaps) from the beginning to the end."""
        found: list[int] = []
        gaps: list[tuple[int, int, str]] = []

        def gap(error: GapError) -> None:
            gaps.append((error.first, error.last, error.reason))

        with Consumer(self.broker.server, [TOPIC], start="earliest", auto_ack=False, on_gap=gap) as consumer:

            def at_the_end() -> bool:
                for record in consumer.poll(0.05):
                    found.append(int((record.value or b"").rstrip(b".")))
                    consumer.ack(record)
                places = consumer.next_offsets()
                return bool(places) and min(places.values()) >= self.n

            wait_for(at_the_end, "the reader comes to the end", SECONDS)
        return found, gaps

    def all_there(self, what: str) -> None:
        found, gaps = self.read()
        assert (found, gaps) == (list(range(self.n)), []), what
        assert self.expired() == 0, what

    def expired(self) -> int:
        return int(call(self.broker.admin, "GET", "/v1/node")["counters"]["records_expired"])

    def restart(self, offset: str, *, crash: bool) -> None:
        """Start again while the clock shows another time."""
        if crash:
            self.broker.kill()
        else:
            assert self.broker.stop() == 0
        set_clock(self.clock, offset)
        self.broker.start()


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    node = Node(tmp_path)
    node.broker.start()
    yield node
    node.broker.kill()


@pytest.mark.parametrize("crash", [False, True], ids=["stopped", "killed"])
def test_nothing_expires_early(node: Node, crash: bool) -> None:
    """Written before and after jumps, read after them, and after starts with the right clock and with one of 1970."""
    node.create(TTL_MS)
    node.publish(WAVE)
    for jump in (2 * HOUR, YEAR, -2 * HOUR, -YEAR):
        set_clock(node.clock, f"{jump:+d}")
        node.publish(WAVE // 4)
        node.all_there(f"after a jump by {jump} s")
    node.restart("+0", crash=crash)
    node.all_there("the clock is right again")
    node.restart(_in_1970(), crash=crash)
    node.publish(WAVE)
    node.all_there("the clock was never set")
    set_clock(node.clock, "+0")
    node.all_there("it is set while the broker runs")
    node.restart("+0", crash=crash)
    node.all_there("and right at the next start")


def test_a_clock_set_back_before_a_start_keeps_everything(node: Node) -> None:
    node.create(TTL_MS)
    node.publish(WAVE)
    for offset in (-2 * HOUR, -YEAR):
        node.restart(f"{offset:+d}", crash=True)
        node.all_there(f"by {offset} s")


def test_with_a_right_clock_whole_batches_expire(node: Node) -> None:
    """In the run that stored them, and by the wall clock in the next one."""
    node.create(1000)
    node.publish(WAVE)
    first = node.n

    def gone() -> bool:
        found, gaps = node.read()
        assert all(reason == "EXPIRED" for _, _, reason in gaps)
        return not found

    waited = wait_for(gone, "all of it expires", SECONDS)
    assert waited > 0.5
    assert node.expired() >= first
    node.publish(10)
    assert node.read()[0] == list(range(first, node.n))
    # Of what an earlier run wrote the wall clock tells the age.
    node.restart("+0", crash=False)
    wait_for(gone, "what is left expires, too", SECONDS)
    assert node.read()[1][-1][1] == node.n - 1


def _in_1970() -> str:
    return f"-{CLOCK.wall_ms() // 1000 - 100 * 24 * HOUR}"
