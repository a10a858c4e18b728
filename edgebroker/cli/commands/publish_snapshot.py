"""`edgebroker publish TOPIC --snapshot`: write a table snapshot, from which consumers can refresh.

begin (only we may publish now) -> read the live keys -> publish them -> complete. A file replaces the content of the
table: keys that are not in it are deleted first, so that consumers which only follow the log see the same.
"""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Iterable
from typing import NamedTuple

from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.render import counted
from edgebroker.client.accumulator import Sent
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.common.records import Record
from edgebroker.common.types import TopicPartition

TIMEOUT_SECONDS = 60.0
POLL_SECONDS = 0.2


class LiveRow(NamedTuple):
    """One live key of the new content; partition -1 means by key."""

    key: bytes
    value: bytes
    partition: int = -1
    timestamp: int = -1
    headers: tuple[tuple[str, bytes | None], ...] = ()


def write_snapshot(options: argparse.Namespace, content: Iterable[tuple[bytes | None, bytes]] | None) -> int:
    """Write `content`, (key, value) of the whole table; None stands for what is live in it now."""
    topic = call(options.admin, "GET", api_path("topics", options.topic))
    client_id = f"__snapshot-{secrets.token_hex(8)}"
    path = api_path("topics", options.topic, "snapshot")
    failures: list[Exception] = []

    def note(sent: Sent) -> None:
        error = sent.exception()
        if error is not None:
            failures.append(error)

    # The broker reserves the topic for this client while it is connected, so connect before the snapshot begins.
    with Producer(
        options.server, client_id=client_id, compression=options.compression, timeout=TIMEOUT_SECONDS
    ) as producer:
        producer.open_topic(options.topic)
        begun = call(options.admin, "POST", path, {"client_id": client_id})
        path = f"{path}/{begun['id']}"
        try:
            starts = {
                part["partition"]: max(part["log_start"], part["snapshot"]["first"] if part["snapshot"] else 0)
                for part in topic["partitions"]
            }
            ends = {int(number): int(offset) for number, offset in begun["first"].items()}
            live = read_live(options.server, options.topic, starts, ends)
            rows, gone = _plan(live, content)
            for record in gone:
                producer.send(options.topic, None, record.key, partition=record.partition).add_done_callback(note)
            for row in rows:
                sent = producer.send(
                    options.topic, row.value, row.key, headers=row.headers, partition=row.partition,
                    timestamp=row.timestamp,
                )  # fmt: skip
                sent.add_done_callback(note)
            producer.flush(TIMEOUT_SECONDS)
            if failures:
                raise failures[0]
        except BaseException:
            call(options.admin, "DELETE", path)
            raise
    call(options.admin, "POST", path)
    result = {"topic": options.topic, "keys": len(rows), "deleted": len(gone)}
    text = f"{options.topic}: snapshot of {counted(len(rows), 'key')} written, {counted(len(gone), 'key')} deleted"
    print(json.dumps(result) if options.json else text)
    return 0


def read_live(server: str, topic: str, starts: dict[int, int], ends: dict[int, int]) -> dict[bytes, Record]:
    """The last record of each key that was not deleted, in the order in which they were published."""
    live: dict[bytes, Record] = {}
    left = {number for number, end in ends.items() if starts[number] < end}
    with Consumer(server, [topic], start="earliest", timeout=TIMEOUT_SECONDS) as consumer:
        for number, start in starts.items():
            consumer.seek(topic, number, start)
        while left:
            for record in consumer.poll(POLL_SECONDS):
                if record.key is None:
                    raise EdgeBrokerError(
                        f"{topic}/{record.partition}: the record at offset {record.offset} has no key, so {topic} is "
                        "not a "
                        "table; publish records with keys only"
                    )
                live.pop(record.key, None)
                if record.value is not None and record.offset < ends[record.partition]:
                    live[record.key] = record
                consumer.ack(record)
            positions = consumer.next_offsets()
            left = {number for number in left if positions.get(TopicPartition(topic, number), -1) < ends[number]}
    return live


def _plan(
    live: dict[bytes, Record], content: Iterable[tuple[bytes | None, bytes]] | None
) -> tuple[list[LiveRow], list[Record]]:
    """The rows to write, and the records to delete."""
    if content is None:
        rows = [
            LiveRow(key, record.value or b"", record.partition, record.timestamp, record.headers)
            for key, record in live.items()
        ]
        return rows, []
    wanted: dict[bytes, bytes] = {}
    for key, value in content:
        if key is None:
            raise ConfigError("every row of a table needs a key; name its column with --key-column")
        wanted[key] = value
    return [LiveRow(key, value) for key, value in wanted.items()], [live[key] for key in live if key not in wanted]
