"""Batches of Kafka's clients, recorded (tests/golden/foreign_batches.txt): a node takes them, and gives them back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.common import batch
from edgebroker.common.errors import Code
from edgebroker.network.wire.frames import WANT_PRODUCER
from tests.kit.brokers import RunningBroker, running, take

SAMPLES: dict[str, list[bytes]] = defaultdict(list)
for line in (Path(__file__).parent.parent / "golden" / "foreign_batches.txt").read_text().splitlines():
    if not line.startswith("#"):
        *words, data = line.split()
        SAMPLES["-".join(words)].append(bytes.fromhex(data))
ROWS = [
    (b"key", b"value"),
    (None, b"no key"),
    (b"key", None),
    ("Käse".encode(), "12,99 €".encode() * 30),
]


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    with running(tmp_path_factory.mktemp("foreign") / "data") as found:
        yield found


def test_every_client_is_there() -> None:
    clients = {"librdkafka", "kafka-python", "aiokafka", "KafkaJS", "Java", "franz-go", "sarama"}
    assert {name.rsplit("-", 2)[0] for name in SAMPLES} == clients


@pytest.mark.parametrize("name", sorted(SAMPLES))
def test_a_batch_is_taken(broker: RunningBroker, name: str) -> None:
    client, end = broker.raw(name), 0
    for data in SAMPLES[name]:
        header = batch.read_header(data)
        if header.producer_id >= 0:  # its client was granted it
            own = {"producer_id": header.producer_id, "producer_epoch": header.producer_epoch}
            assert client.connect(f"owner-{header.producer_id}", flags=WANT_PRODUCER, **own).producer_id >= 0
        answer = client.publish(name, data)
        assert (answer.code, answer.offset) == (Code.OK, end), answer.message
        if header.producer_id >= 0:
            assert client.publish(name, data)[:2] == (Code.OK, end), "a repeat is recognised"
        end += header.count
    with broker.consumer([name], start="earliest", timeout=10.0) as consumer:
        found = take(consumer, end)
    assert [(record.key, record.value) for record in found] == ROWS
    assert [key for key, _ in found[-1].headers] == ["ü"]
