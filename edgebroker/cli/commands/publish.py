"""`edgebroker publish`: lines of stdin or rows of a CSV file, until every one is acknowledged."""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import sys
from collections.abc import Iterator
from typing import IO, NamedTuple

from edgebroker.cli.pace import Pace
from edgebroker.cli.progress import progress
from edgebroker.client.accumulator import Sent
from edgebroker.client.producer import Producer
from edgebroker.common.errors import ConfigError


class Message(NamedTuple):
    key: bytes | None
    value: bytes


def publish(options: argparse.Namespace) -> int:
    if options.key_column and not options.csv:
        raise ConfigError("--key-column names a column of --csv FILE")
    messages = _rows(options.csv, options.key_column) if options.csv else _lines(options.key)
    if options.snapshot:
        from edgebroker.cli.commands.publish_snapshot import write_snapshot

        return write_snapshot(options, _rows(options.csv, options.key_column) if options.csv else None)
    reports = Reports(options.json)
    with Producer(
        options.server,
        ack=options.ack,
        compression=options.compression,
        timeout=None,
        linger_ms=1.0,
        client_id=options.client_id,
    ) as producer:
        bar = progress(None, "rec", quiet=options.quiet)
        pace = Pace(options.rate)
        for number, message in enumerate(messages, 1):
            pace.wait(number)
            headers = [(options.line_header, str(number).encode())] if options.line_header else None
            sent = producer.send(
                options.topic, message.value, message.key, headers=headers, partition=options.partition
            )
            sent.add_done_callback(reports.on_done)
            bar.update(1)
        producer.flush()
        bar.close()
    reports.finish()
    if reports.failed:
        print(f"edgebroker: {reports.failed} records were refused: {reports.error}", file=sys.stderr)
        return 1
    return 0


class Reports:
    """With --json one line for each acknowledged batch: records of one partition that got consecutive offsets."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._open: dict[str, object] | None = None
        self.failed = 0
        self.error: Exception | None = None

    def on_done(self, sent: Sent) -> None:
        """On the I/O thread: futures of a batch complete one after the other."""
        error = sent.exception()
        if error is not None:
            self.failed += 1
            self.error = error
            return
        if not self._enabled:
            return
        offset, line = sent.result(), self._open
        if line is not None and (line["topic"], line["partition"]) == (sent.topic, sent.partition):
            first, count = line["first_offset"], line["count"]
            assert isinstance(first, int) and isinstance(count, int)
            if offset == first + count and count < 1000:
                line["count"] = count + 1
                return
        self.finish()
        self._open = {"topic": sent.topic, "partition": sent.partition, "first_offset": offset, "count": 1}

    def finish(self) -> None:
        if self._open is not None:
            print(json.dumps(self._open), flush=True)
            self._open = None


def _lines(key: str | None) -> Iterator[Message]:
    raw = key.encode() if key is not None else None
    for line in sys.stdin.buffer:
        yield Message(raw, line.rstrip(b"\n"))


def _rows(path: str, key_column: str | None) -> Iterator[Message]:
    try:
        with _open_text(path) as file:
            reader = csv.DictReader(file)
            if key_column and key_column not in (reader.fieldnames or []):
                raise ConfigError(f"{path} has no column {key_column}; it has {', '.join(reader.fieldnames or [])}")
            for row in reader:
                key = row[key_column].encode() if key_column else None
                yield Message(key, json.dumps(row, ensure_ascii=False).encode())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}") from error


def _open_text(path: str) -> IO[str]:
    if path.endswith(".gz"):
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return open(path, encoding="utf-8", newline="")
