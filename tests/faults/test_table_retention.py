"""A table whose beginning was removed: no half refresh, NO_SNAPSHOT until there is a complete one, which then stays."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.errors import AnswerError, EdgeBrokerError
from edgebroker.common.types import Position
from tests.kit.waiting import wait_for

from .refresher import Store
from .traffic import SETTINGS

pytestmark = pytest.mark.slow

TOPIC, GROUP = "stock", "mirrors"
KEYS = 40
SECONDS = 20.0
FILLER = "." * 2000
TABLE = {"name": TOPIC, "kind": "table", "segment_bytes": 64 << 10, "retention_bytes": 128 << 10}


class Table:
    """A broker with one table whose oldest segments go, what is live in it, and a store that mirrors it."""

    def __init__(self, directory: Path) -> None:
        self.broker = BrokerProcess(directory / "data", settings=SETTINGS | {"EDGEBROKER_LOG_LEVEL": "warning"})
        self.broker.start()
        call(self.broker.admin, "POST", "/v1/topics", TABLE)
        self.store = Store(directory / "store.db")
        self.directory = directory / "data" / "topics" / TOPIC / "0"
        self.live: dict[str, str] = {}
        self._n = 0

    def publish(self, count: int) -> None:
        """Change `count` rows; each fills some of a segment. Key 0 is written once and never again."""
        with Producer(self.broker.server, client_id="keeper", timeout=30.0) as producer:
            sent = []
            for _ in range(count):
                key = f"k{self._n % KEYS or (0 if self._n == 0 else 1)}"
                self.live[key] = f"{self._n}{FILLER}"
                sent.append(producer.send(TOPIC, self.live[key].encode(), key.encode(), partition=0))
                self._n += 1
            for each in sent:
                each.result(SECONDS)

    def part(self) -> dict[str, Any]:
        (found,) = call(self.broker.admin, "GET", f"/v1/topics/{TOPIC}")["partitions"]
        return dict(found)

    def line(self) -> dict[str, Any]:
        (found,) = call(self.broker.admin, "GET", f"/v1/groups/{GROUP}")["partitions"]
        return dict(found)

    def churn(self, above: int) -> None:
        """Publish until the log begins above an offset."""

        def gone() -> bool:
            self.publish(20)
            return bool(self.part()["log_start"] > above)

        wait_for(gone, "retention removes the beginning", SECONDS)

    def lose_beginning(self) -> None:
        """The first segment is gone from the disk: no retention would take it."""
        self.broker.kill()
        first = min(self.directory.glob("*.log"))
        first.unlink()
        first.with_suffix(".index").unlink(missing_ok=True)
        self.broker.start()

    def begin_snapshot(self) -> dict[str, Any]:
        """Announce one and publish every live row; it is not complete yet."""
        begun = dict(call(self.broker.admin, "POST", f"/v1/topics/{TOPIC}/snapshot", {"client_id": "__snapshot-test"}))
        path = f"/v1/topics/{TOPIC}/snapshot/{begun['id']}"
        call(self.broker.admin, "PUT", path, {"source": "content", "keys": len(self.live)})
        with Producer(self.broker.server, client_id="__snapshot-test", timeout=30.0) as producer:
            sent = [producer.send(TOPIC, value.encode(), key.encode(), partition=0) for key, value in self.live.items()]
            for each in sent:
                each.result(SECONDS)
        return begun

    def complete(self, begun: dict[str, Any]) -> None:
        call(self.broker.admin, "POST", f"/v1/topics/{TOPIC}/snapshot/{begun['id']}")

    def mirror(self, consumer: Consumer) -> None:
        """Poll until the store shows what is live and the broker knows that it is ready."""

        def same() -> bool:
            records = consumer.poll(0.05)
            if records:
                self.store.put("visible", records, records[-1].offset + 1)
                consumer.ack(records[-1])
            return self.store.visible().rows == self.live and self.line()["refresh"]["state"] == "ready"

        wait_for(same, "the mirror shows what is live", SECONDS)

    def consumer(self, **options: Any) -> Consumer:
        return Consumer(self.broker.server, [TOPIC], GROUP, auto_ack=False, staging=self.store, **options)


@pytest.fixture
def table(tmp_path: Path) -> Iterator[Table]:
    table = Table(tmp_path)
    yield table
    table.broker.kill()
    table.store.close()


def test_a_refresh_waits_for_a_complete_snapshot(table: Table) -> None:
    for _ in range(10):
        table.publish(KEYS // 4)
    assert table.part()["log_start"] == 0, "without a snapshot nothing of a table is removed"
    table.lose_beginning()
    foreign = {(TOPIC, 0): Position(b"\x01" * 16, 0, 3)}
    with table.consumer(positions=foreign) as consumer:
        with pytest.raises(AnswerError, match="no complete snapshot"):
            consumer.poll(SECONDS)
        line = table.line()
        assert (line["member"]["state"], line["refresh"]) == ("no_snapshot", None)
        assert "snapshot" in line["member"]["why"]
        with pytest.raises(AnswerError, match="snapshot"):
            consumer.refresh(TOPIC, 0)
        with pytest.raises(EdgeBrokerError, match="snapshot"):
            call(table.broker.admin, "POST", f"/v1/groups/{GROUP}/refresh", {"topic": TOPIC})
        assert (table.line()["committed"], table.line()["refresh"]) == (line["committed"], None)
        begun = table.begin_snapshot()
        # All of its rows are there; without its end it is none.
        assert table.line()["member"]["state"] == "no_snapshot"
        assert table.part()["snapshot"] is None
        assert table.store.visible().rows == {}
        table.complete(begun)
        assert table.part()["snapshot"]["first"] == begun["first"]["0"]
        table.mirror(consumer)
        assert table.line()["refresh"]["from"] == begun["first"]["0"]
        assert len(table.store.visible().switches) == 1


def test_retention_stops_before_the_newest_snapshot(table: Table) -> None:
    table.publish(KEYS)
    first = table.begin_snapshot()
    table.complete(first)
    held = first["first"]["0"]
    table.churn(0)
    for _ in range(10):
        table.publish(40)
        assert table.part()["log_start"] <= held
    # An unfinished one, and a crash in the middle of it, change nothing.
    table.begin_snapshot()
    table.broker.kill()
    table.broker.start()
    sweeps = _sweeps(table)
    wait_for(lambda: _sweeps(table) >= sweeps + 3, "retention looks at it", SECONDS)
    assert table.part()["log_start"] <= held
    with table.consumer() as consumer:
        consumer.poll(0.0)
        wait_for(lambda: _held(table), "the partition is held", SECONDS)
        consumer.refresh(TOPIC, 0)
        table.mirror(consumer)
        assert table.line()["refresh"]["from"] == held
        second = table.begin_snapshot()
        table.complete(second)
        newer = second["first"]["0"]
        wait_for(lambda: table.part()["log_start"] > held, "what the older one kept goes", SECONDS)
        table.churn(held)
        assert table.part()["log_start"] <= newer
        consumer.refresh(TOPIC, 0)
        table.mirror(consumer)
        assert table.line()["refresh"]["from"] == newer


def _held(table: Table) -> bool:
    groups = call(table.broker.admin, "GET", "/v1/groups")["groups"]
    return any(line["member"] for group in groups for line in group["partitions"])


def _sweeps(table: Table) -> int:
    return int(call(table.broker.admin, "GET", "/v1/node")["uptime_seconds"])
