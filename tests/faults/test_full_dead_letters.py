"""No space for a dead letter: its partition waits and says so, the others go on; with space there is exactly one."""

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.records import Record
from tests.kit.waiting import wait_for

from .checker import History, origin_of, read_back
from .group_checker import Letter, read_letters
from .powercut import Disk
from .test_full_disk import DISK_BYTES, REASON, Small
from .traffic import SETTINGS, send_value

pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON or "available"), pytest.mark.slow]

TOPIC, GROUP = "orders", "tills"
# So large that the letters of the earlier ones fill the first segment of their topic: the last one needs space.
EARLIER, POISON = (2, 4, 6, 8), 20
POISON_BYTES = 15_500
PER_PARTITION = 50
ATTEMPTS = 2
DELIVERY = {
    "EDGEBROKER_DELIVERY_MAX_ATTEMPTS": str(ATTEMPTS),
    "EDGEBROKER_DELIVERY_BACKOFF_MS": "20",
    "EDGEBROKER_LOG_LEVEL": "warning",
}


class Till(Consumer):
    """Handles everything but some records of partition 0, which it refuses."""

    def __init__(self, server: str, refuses: set[int]) -> None:
        self.handled: dict[int, list[int]] = {0: [], 1: []}
        self.refused: Counter[int] = Counter()
        self._refuses = refuses
        super().__init__(server, [TOPIC], GROUP, client_id="till", auto_ack=False)

    def step(self) -> None:
        for record in self.poll(0.02):
            if not self._take(record):
                break

    def _take(self, record: Record) -> bool:
        if record.partition == 0 and record.offset in self._refuses:
            self.refused[record.offset] += 1
            self.nack(record, "no such article")
            return False
        self.handled[record.partition].append(record.offset)
        self.ack(record)
        return True


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Small]:
    with Disk(tmp_path / "disk", size=DISK_BYTES) as disk:
        node = Small(disk)
        node.broker = BrokerProcess(disk.mount, settings=SETTINGS | DELIVERY)
        yield node
        node.broker.kill()


@pytest.mark.parametrize("known", [False, True], ids=["new", "known"])
@pytest.mark.parametrize("crash", [False, True], ids=["stays", "killed"])
def test_a_dead_letter_waits_for_space(
    small: Small, known: bool, crash: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """With and without a dead-letter topic from before; with and without a kill -9 of the broker while it waits."""
    caplog.set_level(logging.WARNING, "edgebroker.client.consume.subscriber")
    logging.getLogger("edgebroker.client.consume.subscriber").setLevel(logging.WARNING)
    broker, history = small.broker, History()
    broker.start()
    call(broker.admin, "POST", "/v1/topics", {"name": TOPIC, "partitions": 2})
    refused = {*EARLIER, POISON} if known else {POISON}
    handled = [offset for offset in range(PER_PARTITION) if offset not in refused]
    with Producer(broker.server, client_id="p") as producer:
        for n in range(2 * PER_PARTITION):
            large = n % 2 == 0 and n // 2 in (*EARLIER, POISON)
            send_value(history, producer, TOPIC, n % 2, "p", n, POISON_BYTES if large else 100)
    till = Till(broker.server, refused)
    with till:

        def turn(condition: Any, what: str) -> None:
            def done() -> bool:
                till.step()
                return bool(condition())

            wait_for(done, what, 20.0)

        turn(lambda: till.refused[POISON] == 1, "the first attempt")
        small.fill()
        turn(lambda: _line(broker, 0)["state"] == "dead_lettering", "the letter waits")
        turn(lambda: "cannot be written" in _line(broker, 0)["why"], "the broker says why")
        turn(lambda: len(set(till.handled[1])) == PER_PARTITION, "the other partition goes on")
        turn(lambda: _told(caplog), "the client is told")
        if crash:
            broker.kill()
            small.fill()
            broker.start()
            turn(lambda: "cannot be written" in _line(broker, 0)["why"], "it says so again after a start")
        # A kill may bring back what was acknowledged, or failed, and could not be stored.
        assert till.refused[POISON] >= ATTEMPTS if crash else till.refused[POISON] == ATTEMPTS
        assert crash or till.handled[0] == handled[: handled.index(POISON + 1)]
        assert max(till.handled[0]) == POISON - 1
        assert _line(broker, 0)["acked"] == POISON
        assert len(_letters(broker)) == len(refused) - 1
        small.free()
        turn(lambda: set(till.handled[0]) == set(handled), "delivery goes on")
        till.commit(10.0)
        assert crash or till.handled[0] == handled
        assert crash or till.refused[POISON] == ATTEMPTS
    letters = _letters(broker)
    assert [(letter.partition, letter.offset) for letter in letters] == [(0, offset) for offset in sorted(refused)]
    letter = letters[-1]
    assert letter.headers["eb-dlq-reason"] in ("no such article", *(["it failed in an earlier run"] if crash else []))
    content = read_back(broker, TOPIC)
    assert letter.origin == origin_of(dict(content[0].records)[POISON])
    history.check(TOPIC, content)
    assert broker.stop() == 0


def _line(broker: BrokerProcess, partition: int) -> dict[str, Any]:
    groups = call(broker.admin, "GET", "/v1/groups")["groups"]
    lines = [line for group in groups if group["name"] == GROUP for line in group["partitions"]]
    found = [line["member"] for line in lines if line["partition"] == partition and line["member"]]
    return found[0] if found else {"state": "", "why": "", "acked": -1}


def _told(caplog: pytest.LogCaptureFixture) -> bool:
    return any("dlq" in record.getMessage() and "DISK_FULL" in record.getMessage() for record in caplog.records)


def _letters(broker: BrokerProcess) -> list[Letter]:
    name = f"{TOPIC}.dlq"
    topics = call(broker.admin, "GET", "/v1/topics")["topics"]
    end = sum(part["durable_end"] for line in topics if line["name"] == name for part in line["partitions"])
    return read_letters(broker, TOPIC, end)
