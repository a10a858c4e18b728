"""`edgebroker publish`: publish lines of stdin or rows of a CSV file, until every record is acknowledged."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import NamedTuple

from edgebroker.cli.command import Parser, admin_flag, at_least, credentials_flag, json_flag, rate, server_flag
from edgebroker.cli.csv_file import read_rows
from edgebroker.cli.pace import Pace
from edgebroker.cli.progress import progress
from edgebroker.cli.render import counted
from edgebroker.client.arguments import MOST_PARTITION, check_whole
from edgebroker.client.producer import Producer
from edgebroker.client.publish.accumulator import Sent
from edgebroker.common.errors import ConfigError, EdgeBrokerError, RecordTooLargeError


class InputRecord(NamedTuple):
    key: bytes | None
    value: bytes


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=publish)
    parser.description = (
        "Publish each line of stdin as a record, or each row of a CSV file as JSON. While the broker cannot be reached "
        "the command retries; it ends when every record is acknowledged."
    )
    parser.add_argument("topic")
    server_flag(parser)
    credentials_flag(parser)
    parser.add_argument("--key", help="key of every record")
    parser.add_argument("--csv", metavar="FILE", help="publish each row of a CSV file as JSON; it may be gzipped (.gz)")
    parser.add_argument("--key-column", metavar="COLUMN", help="with --csv: the column that holds the key")
    parser.add_argument("--line-header", metavar="NAME", help="add the line number as a header of this name")
    parser.add_argument(
        "--rate", type=rate, default=0.0, metavar="N", help="publish N records a second (default 0: no limit)"
    )
    parser.add_argument(
        "--partition",
        type=at_least(-1),
        default=-1,
        metavar="N",
        help="partition (default -1: by key, or in turn without keys)",
    )
    parser.add_argument(
        "--ack",
        choices=("replicated", "durable", "written", "none"),
        default="durable",
        help="when the broker acknowledges: once nodes below have synced it as well (topic setting replicas), once "
        "synced, once written, or never (default durable)",
    )
    parser.add_argument(
        "--compression", choices=("none", "gzip", "lz4", "zstd"), default="none", help="codec (default none)"
    )
    parser.add_argument(
        "--snapshot",
        action="store_true",
        help="write a table snapshot: the live keys of the table or, with --csv, its complete new content (keys that "
        "are not in the file are deleted)",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="with --snapshot: say what it would change, change nothing"
    )
    parser.add_argument(
        "--allow-deletes",
        type=at_least(0),
        default=-1,
        metavar="N",
        help="with --snapshot: delete up to N keys (default: 10, or the share that the topic allows)",
    )
    parser.add_argument(
        "--skip-bad",
        action="store_true",
        help="leave out lines and rows that cannot be a record, because they are too large, and say how many they were",
    )
    parser.add_argument("--client-id", default="", metavar="NAME", help="name of this producer")
    admin_flag(parser)
    json_flag(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress bar")


def publish(options: argparse.Namespace) -> int:
    if not options.csv and "stdin" in options.closed_streams:
        raise ConfigError("standard input is closed; there are no lines to publish")
    check_whole("--partition", options.partition, -1, MOST_PARTITION)
    if options.key_column and not options.csv:
        raise ConfigError("--key-column needs --csv FILE")
    if options.key is not None and options.csv:
        raise ConfigError("--key cannot be used with --csv; name a column with --key-column")
    rows = _rows(options.csv, options.key_column, whole=options.snapshot) if options.csv else None
    if (options.dry_run or options.allow_deletes >= 0) and not options.snapshot:
        raise ConfigError("--dry-run and --allow-deletes belong to --snapshot")
    if options.snapshot:
        from edgebroker.cli.commands.publish_snapshot import write_snapshot

        return write_snapshot(options, rows)
    acknowledged = Acknowledgements(options.json)
    skipped = Skipped("line" if rows is None else "row", options.skip_bad)
    try:
        with Producer(
            options.server,
            credentials=options.credentials,
            ack=options.ack,
            compression=options.compression,
            timeout=None,
            linger_ms=1.0,
            client_id=options.client_id,
        ) as producer:
            bar = progress(None, "rec", quiet=options.quiet)
            pace = Pace(options.rate)
            for number, record in enumerate(_lines(options.key) if rows is None else rows, 1):
                pace.wait(number)
                headers = [(options.line_header, str(number).encode())] if options.line_header else None
                try:
                    sent = producer.send(
                        options.topic, record.value, record.key, headers=headers, partition=options.partition
                    )
                except RecordTooLargeError as error:
                    skipped.add(number, error)
                    continue
                sent.add_done_callback(acknowledged.on_done)
                bar.update(1)
            producer.flush()
            bar.close()
    finally:
        acknowledged.finish()
    skipped.tell()
    if acknowledged.unprinted is not None:
        raise acknowledged.unprinted
    if acknowledged.failed:
        refused = counted(acknowledged.failed, "record")
        print(f"edgebroker: the broker refused {refused}: {acknowledged.error}", file=sys.stderr)
        return 1
    return 0


class Skipped:
    """Lines and rows that cannot be a record."""

    def __init__(self, what: str, allowed: bool) -> None:
        self._what, self._allowed = what, allowed
        self._count, self._first = 0, ""

    def add(self, number: int, error: RecordTooLargeError) -> None:
        """Raises EdgeBrokerError unless it may be left out."""
        why = f"{self._what} {number}: {error}"
        if not self._allowed:
            raise EdgeBrokerError(f"{why}; what is before it is published, --skip-bad goes on behind it")
        self._count, self._first = self._count + 1, self._first or why

    def tell(self) -> None:
        if self._count:
            print(
                f"edgebroker: left out {counted(self._count, self._what)}; the first is {self._first}", file=sys.stderr
            )


class Acknowledgements:
    """Counts refused records; with --json prints a line for each run of consecutive offsets in a partition."""

    def __init__(self, enabled: bool) -> None:
        self._enabled = enabled
        self._open: dict[str, object] | None = None
        self.failed = 0
        self.error: Exception | None = None
        # Why nothing is printed any more.
        self.unprinted: OSError | None = None

    def on_done(self, sent: Sent) -> None:
        """Called on the I/O thread, for the records of a batch in order."""
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
        if self._open is not None and self.unprinted is None:
            try:
                print(json.dumps(self._open), flush=True)
            except OSError as error:
                self.unprinted = error
        self._open = None


def _lines(key: str | None) -> Iterator[InputRecord]:
    raw = key.encode() if key is not None else None
    for line in sys.stdin.buffer:
        yield InputRecord(raw, line.rstrip(b"\n"))


def _rows(path: str, key_column: str | None, *, whole: bool) -> Iterator[InputRecord]:
    for row in read_rows(path, key_column, whole=whole):
        key = row.fields[key_column].encode() if key_column else None
        yield InputRecord(key, json.dumps(row.fields, ensure_ascii=False).encode())
