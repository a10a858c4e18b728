"""A table keeps its keys: whatever wants bytes back, and whatever file is published as its whole content."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from edgebroker.broker.engines import store_settings
from edgebroker.cli.main import main
from edgebroker.common.errors import Code
from edgebroker.common.types import TopicSettings
from edgebroker.storage.identity import change_identity
from edgebroker.storage.types import Identity
from tests.kit.brokers import RunningBroker, numbered, running
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow

SMALL = {"storage.segment_bytes": 64 << 10, "storage.soft_free_bytes": 0, "storage.hard_free_bytes": 0}
KEYS = 300


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    return price_file(tmp_path / "prices.csv", KEYS)


@pytest.fixture
def broker(directory: Path) -> Iterator[RunningBroker]:
    with running(directory, SMALL) as found:
        found.create("prices", kind="table")
        yield found


def price_file(path: Path, count: int) -> Path:
    rows = [f"{number},{'x' * 1000} {number},1.99" for number in range(count)]
    path.write_text("\n".join(["Item,Name,Price", *rows]) + "\n")
    return path


def publish_file(broker: RunningBroker, path: Path, *more: str) -> int:
    tcp, http = broker.broker.listeners.tcp_address, broker.broker.listeners.http_address
    return main(
        [
            *("publish", "prices", "--quiet", "--csv", str(path), "--key-column", "Item"),
            *("--server", f"{tcp[0]}:{tcp[1]}", "--admin", f"{http[0]}:{http[1]}", *more),
        ]
    )


def log(broker: RunningBroker) -> Any:
    return broker.broker.engine.log("prices", 0)


def keys(broker: RunningBroker) -> tuple[set[bytes | None], list[tuple[int, int]]]:
    """What a new reader sees as live, and the gaps that it was told of."""
    gaps: list[tuple[int, int]] = []
    live: dict[bytes | None, bytes] = {}
    end = log(broker).durable_end
    with broker.consumer(
        ["prices"], start="earliest", timeout=10.0, on_gap=lambda gap: gaps.append((gap.first, gap.last))
    ) as consumer:

        def take() -> bool:
            for record in consumer.poll(0.1):
                live.pop(record.key, None)
                if record.value is not None:
                    live[record.key] = record.value
            return max(consumer.next_offsets().values(), default=0) >= end

        wait_for(take, "everything is read")
    return set(live), gaps


# ---- what wants bytes back ----


def test_no_budget_takes_keys(broker: RunningBroker, prices: Path) -> None:
    """A group has read all of it, and another topic fills the budget; only a snapshot of its own makes room."""
    assert publish_file(broker, prices) == 0
    with broker.consumer(["prices"], "tills", start="earliest", timeout=10.0) as consumer:
        while (records := consumer.poll(1.0)) or not consumer.next_offsets():
            consumer.ack(records[-1])
            if records[-1].offset == KEYS - 1:
                break
    broker.broker.engine.reconfigure(store_settings_of(broker, max_bytes=500_000))
    producer = broker.raw("other")
    refused = False
    for number in range(400):
        refused = refused or producer.publish("other", numbered(number, 1, 4000)).code is Code.DISK_FULL
        if refused:
            break
        broker.advance(1.1)
    assert refused
    for _ in range(5):
        broker.advance(1.1)
    assert log(broker).log_start <= max(log(broker).identity.snapshot[0], 0)
    live, gaps = keys(broker)
    assert len(live) == KEYS
    # It may go while it is read: then only what the snapshot replaces.
    assert all(last < log(broker).identity.snapshot[0] for _, last in gaps)


def test_no_retention_takes_keys(broker: RunningBroker, prices: Path) -> None:
    assert broker.http("PATCH", "/v1/topics/prices", {"retention_bytes": 100_000, "retention_ms": 1})[0] == 200
    assert publish_file(broker, prices) == 0
    for _ in range(5):
        broker.advance(1.1)
    assert (log(broker).log_start, len(keys(broker)[0])) == (0, KEYS)
    assert publish_file(broker, prices, "--snapshot") == 0
    broker.advance(1.1)
    wait_for(lambda: log(broker).log_start > 0, "what is before the snapshot goes")
    assert len(keys(broker)[0]) == KEYS
    assert keys(broker)[1] == []


def store_settings_of(broker: RunningBroker, **limits: int) -> Any:
    settings = store_settings(broker.broker.config)
    return replace(settings, housekeeping=replace(settings.housekeeping, **limits))


# ---- a table that is not complete ----


def test_a_reader_of_an_incomplete_table_is_told(directory: Path, prices: Path) -> None:
    """It was a stream until a moment ago, and retention took its beginning."""
    with running(directory, SMALL) as broker:
        broker.create("prices", retention_bytes=300_000)
        for _ in range(3):
            assert publish_file(broker, prices) == 0
        broker.advance(1.1)
        wait_for(lambda: log(broker).log_start > 0, "retention takes the beginning")
    change_identity(directory / "topics" / "prices" / "0", lambda old: replace(old, settings=table_of(old)))
    with running(directory, SMALL) as broker:
        start = log(broker).log_start
        assert keys(broker)[1] == [(0, start - 1)]
        tcp, http = broker.broker.listeners.tcp_address, broker.broker.listeners.http_address
        command = [
            "publish",
            "prices",
            "--snapshot",
            "--server",
            f"{tcp[0]}:{tcp[1]}",
            "--admin",
            f"{http[0]}:{http[1]}",
        ]
        assert main(command) == 1, "what is left is not the table"
        assert log(broker).identity.snapshot == (-1, -1)
        assert publish_file(broker, prices, "--snapshot") == 0
        assert keys(broker)[1] == []
        assert len(keys(broker)[0]) == KEYS
        assert main(command) == 0, "it is complete from the last snapshot on"


def table_of(identity: Identity) -> TopicSettings:
    return replace(identity.settings, kind="table")


# ---- a file as the whole content ----


def test_a_file_that_would_delete_too_much(
    broker: RunningBroker, prices: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert publish_file(broker, prices, "--snapshot") == 0
    assert "300 new, 0 changed, 0 deleted" in capsys.readouterr().out
    before = log(broker).durable_end
    shorter = price_file(tmp_path / "shorter.csv", KEYS - 11)
    assert publish_file(broker, shorter, "--snapshot") == 1
    assert "--allow-deletes 11" in capsys.readouterr().err
    assert len(keys(broker)[0]) == KEYS
    assert publish_file(broker, shorter, "--snapshot", "--dry-run") == 0
    assert "would have 289 keys: 0 new, 0 changed, 11 deleted" in capsys.readouterr().out
    assert len(keys(broker)[0]) == KEYS
    assert log(broker).durable_end == before + 2, "what was given up left its beginning only"
    assert publish_file(broker, shorter, "--snapshot", "--allow-deletes", "11") == 0
    assert len(keys(broker)[0]) == KEYS - 11


@pytest.mark.parametrize("damage", ["quote", "cut", "header"])
def test_a_damaged_file_changes_nothing(broker: RunningBroker, prices: Path, tmp_path: Path, damage: str) -> None:
    assert publish_file(broker, prices, "--snapshot") == 0
    end, text = log(broker).durable_end, prices.read_text()
    damaged = tmp_path / "damaged.csv"
    lines = text.splitlines(keepends=True)
    lines[4] = lines[4].replace(",x", ',"x')
    damaged.write_text({"quote": "".join(lines), "cut": text[:4000], "header": lines[0]}[damage])
    assert publish_file(broker, damaged, "--snapshot") in (1, 2)
    assert len(keys(broker)[0]) == KEYS
    assert log(broker).durable_end <= end + 1
