"""Makes a golden data directory with the release at hand: python tests/golden/make.py > tests/golden/format-1.tar.gz

Run it once for each data format, before the next one is begun; never again afterwards. tests/test_golden.py opens all
of them with every later release.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from pathlib import Path

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer

SETTINGS = {"EDGEBROKER_STORAGE_SEGMENT_BYTES": "65536", "EDGEBROKER_REGISTRY_ENABLED": "true",
            "EDGEBROKER_DELIVERY_MAX_ATTEMPTS": "1"}  # fmt: skip
COUNT, READ = 2000, 700


def fill(broker: BrokerProcess) -> None:
    """Two partitions of a stream with sealed segments, a table in another codec, a group half-way, a dead letter."""
    call(broker.admin, "POST", "/v1/topics", {"name": "sales", "partitions": 2, "message_ttl_ms": 10**12})
    call(broker.admin, "POST", "/v1/topics", {"name": "prices", "kind": "table", "on_damage": "skip"})
    with Producer(broker.server, client_id="golden") as producer:
        for number in range(COUNT):
            value = b"sale %d %s" % (number, b"x" * 150)
            producer.send("sales", value, partition=number % 2, headers=[("n", b"%d" % number)])
            if number % 100 == 99:
                producer.flush(10.0)
    with Producer(broker.server, client_id="golden-zstd", compression="zstd") as producer:
        for number in range(COUNT):
            producer.send("prices", b"%d" % (number * 7) if number % 5 else None, key=b"item-%d" % (number % 100))
    with Consumer(broker.server, ["sales"], "tills", auto_ack=False) as consumer:
        taken = 0
        while taken < READ:
            for record in consumer.poll(5.0)[: READ - taken]:
                consumer.ack(record)
                taken += 1
        consumer.commit(10.0)
    with Consumer(broker.server, ["prices"], "labels", auto_ack=False) as consumer:
        consumer.nack(consumer.poll(5.0)[0], "not for us")
        while call(broker.admin, "GET", "/v1/node")["counters"]["dead_letters"] < 1:
            consumer.poll(0.1)


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place) / "node"
        with BrokerProcess(directory, settings=SETTINGS) as broker:
            fill(broker)
        with tarfile.open(fileobj=sys.stdout.buffer, mode="w:gz") as archive:
            for path in sorted(directory.rglob("*")):
                if path.name not in ("reserve", "LOCK") and (path.is_file() or path.is_dir()):
                    archive.add(path, str(path.relative_to(directory)), recursive=False)


if __name__ == "__main__":
    main()
