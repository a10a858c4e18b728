"""`edgebroker publish TOPIC --snapshot`: write a table snapshot, from which consumers can refresh.

read the file -> begin (nobody may publish now) -> read the live keys -> declare what changes -> publish -> complete.
A file replaces the content of the table: keys that are not in it are deleted first, so that consumers which only follow
the log see the same. Nothing is written before the whole file was read and the broker agreed to what it would delete.
"""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Iterable
from typing import NamedTuple

from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.render import counted
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.client.publish.accumulator import Sent
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


class SnapshotChanges(NamedTuple):
    """What a snapshot does: the rows that it consists of, the records of the keys that go, and how many keys are new or
    get another value."""

    rows: list[LiveRow]
    gone: list[Record]
    new: int = 0
    changed: int = 0


def write_snapshot(options: argparse.Namespace, content: Iterable[tuple[bytes | None, bytes]] | None) -> int:
    """Write `content`, (key, value) of the whole table; None stands for what is live in it now."""
    wanted = _whole(content) if content is not None else None
    topic = call(options.admin, "GET", api_path("topics", options.topic))
    client_id = f"__snapshot-{secrets.token_hex(8)}"
    path = api_path("topics", options.topic, "snapshot")
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
            changes = _changes(read_live(options.server, options.topic, starts, ends, wanted is None), wanted)
            if options.dry_run:
                call(options.admin, "DELETE", path)
                _tell(options, changes)
                return 0
            source = "log" if wanted is None else "content"
            call(
                options.admin,
                "PUT",
                path,
                {
                    "source": source,
                    "keys": len(changes.rows),
                    "deleted": len(changes.gone),
                    "allow_deletes": options.allow_deletes,
                },
            )
            _publish(producer, options.topic, changes)
        except BaseException:
            call(options.admin, "DELETE", path)
            raise
    call(options.admin, "POST", path)
    _tell(options, changes)
    return 0


def _publish(producer: Producer, topic: str, changes: SnapshotChanges) -> None:
    """Every record of the snapshot, acknowledged. Raises the first refusal."""
    failures: list[Exception] = []

    def note(sent: Sent) -> None:
        error = sent.exception()
        if error is not None:
            failures.append(error)

    for record in changes.gone:
        producer.send(topic, None, record.key, partition=record.partition).add_done_callback(note)
    for row in changes.rows:
        sent = producer.send(
            topic, row.value, row.key, headers=row.headers, partition=row.partition, timestamp=row.timestamp
        )
        sent.add_done_callback(note)
    producer.flush(TIMEOUT_SECONDS)
    if failures:
        raise failures[0]


def _tell(options: argparse.Namespace, changes: SnapshotChanges) -> None:
    keys, deleted = len(changes.rows), len(changes.gone)
    result = {"topic": options.topic, "keys": keys, "new": changes.new, "changed": changes.changed, "deleted": deleted}
    what = "would have" if options.dry_run else "written with"
    text = (
        f"{options.topic}: snapshot {what} {counted(keys, 'key')}: {changes.new} new, {changes.changed} changed, "
        f"{deleted} deleted"
    )
    print(json.dumps(result) if options.json else text)


def read_live(
    server: str, topic: str, starts: dict[int, int], ends: dict[int, int], strict: bool
) -> dict[bytes, Record]:
    """The last record of each key that was not deleted, in the order in which they were published. `strict`: a record
    without a key is an error; what takes the place of all content leaves it behind."""
    live: dict[bytes, Record] = {}
    left = {number for number, end in ends.items() if starts[number] < end}
    with Consumer(server, [topic], start="earliest", missing_topic="raise", timeout=TIMEOUT_SECONDS) as consumer:
        for number, start in starts.items():
            consumer.seek(topic, number, start)
        while left:
            for record in consumer.poll(POLL_SECONDS):
                if record.key is not None:
                    live.pop(record.key, None)
                    if record.value is not None and record.offset < ends[record.partition]:
                        live[record.key] = record
                elif strict:
                    raise EdgeBrokerError(
                        f"{topic}/{record.partition}: the record at offset {record.offset} has no key, so {topic} is "
                        "not a table; publish records with keys only"
                    )
                consumer.ack(record)
            positions = consumer.next_offsets()
            left = {number for number in left if positions.get(TopicPartition(topic, number), -1) < ends[number]}
    return live


def _whole(content: Iterable[tuple[bytes | None, bytes]]) -> dict[bytes, bytes]:
    """The last value of each key. Raises ConfigError when there is a row without a key, or none at all."""
    wanted: dict[bytes, bytes] = {}
    for key, value in content:
        if key is None:
            raise ConfigError("every row of a table needs a key; name its column with --key-column")
        wanted[key] = value
    return wanted


def _changes(live: dict[bytes, Record], wanted: dict[bytes, bytes] | None) -> SnapshotChanges:
    """From what is live to the new content (None: the same)."""
    if wanted is None:
        rows = [
            LiveRow(key, record.value or b"", record.partition, record.timestamp, record.headers)
            for key, record in live.items()
        ]
        return SnapshotChanges(rows, [])
    return SnapshotChanges(
        [LiveRow(key, value) for key, value in wanted.items()],
        [live[key] for key in live if key not in wanted],
        new=sum(key not in live for key in wanted),
        changed=sum(key in live and live[key].value != value for key, value in wanted.items()),
    )
