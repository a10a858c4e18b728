"""`edgebroker consume`: print values to stdout, one a line, or with --json whole records."""

from __future__ import annotations

import argparse
import base64
import sys
from collections.abc import Sequence

from edgebroker.cli.command import Parser, at_least, credentials_flag, duration, server_flag
from edgebroker.cli.render import json_line
from edgebroker.client.arguments import parse_from
from edgebroker.client.consumer import Consumer
from edgebroker.client.refresh import Refresh
from edgebroker.common.errors import ConfigError, GapError
from edgebroker.common.names import printable
from edgebroker.common.records import Record


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=consume)
    parser.description = (
        "Print the values of records to stdout as they arrive, until Ctrl-C, --count or --timeout. A record is "
        "acknowledged once it is printed."
    )
    parser.add_argument("topic", nargs="+")
    server_flag(parser)
    credentials_flag(parser)
    parser.add_argument("--group", default="", help="consumer group (default: none, nothing is committed)")
    parser.add_argument(
        "--from",
        dest="start",
        default="committed",
        metavar="WHERE",
        help="where to start: earliest, latest, committed (the default; earliest for a new group), an OFFSET, or @TIME "
        "in milliseconds since 1970",
    )
    parser.add_argument(
        "--count", type=at_least(0), default=0, metavar="N", help="stop after N records (default 0: never)"
    )
    parser.add_argument(
        "--timeout",
        type=duration,
        default=0.0,
        metavar="TIME",
        help="stop with exit code 1 when no record arrives for this long (default 0: never)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print each record as one line of JSON, with offset, key and headers"
    )


def consume(options: argparse.Namespace) -> int:
    if "stdout" in options.closed_streams:
        raise ConfigError("standard output is closed; there is nowhere to print records to")
    try:
        parse_from(options.start)
    except ValueError as error:
        raise ConfigError(f"--from {error}") from error
    seen = 0
    with Consumer(
        options.server,
        options.topic,
        options.group,
        credentials=options.credentials,
        start=options.start,
        on_gap=_report_gap,
        timeout=options.timeout or 30.0,
        auto_ack=False,
        staging=PrintingStaging(options.json),
    ) as consumer:
        while not options.count or seen < options.count:
            records = consumer.poll(options.timeout or None)
            if not records:
                print(f"edgebroker: no record arrived for {options.timeout:g} s", file=sys.stderr)
                return 1
            if options.count:
                records = records[: options.count - seen]
            sys.stdout.buffer.write(b"".join(line_of(record, options.json) for record in records))
            sys.stdout.buffer.flush()
            seen += len(records)
            # A printed record is handled. What was received but not printed stays unacknowledged.
            consumer.ack(records[-1])
        consumer.commit()
    return 0


class PrintingStaging:
    """A snapshot refresh for a consumer that only prints: the records are printed again."""

    def __init__(self, json_wanted: bool) -> None:
        self._json = json_wanted

    def begin(self, refresh: Refresh) -> int:
        print(
            f"edgebroker: {refresh.topic}/{refresh.partition}: refresh from offset {refresh.from_offset} to "
            f"{refresh.target}",
            file=sys.stderr,
        )
        return refresh.from_offset

    def load(self, refresh: Refresh, records: Sequence[Record]) -> None:
        sys.stdout.buffer.write(b"".join(line_of(record, self._json) for record in records))
        sys.stdout.buffer.flush()

    def switch(self, refresh: Refresh) -> None:
        print(f"edgebroker: {refresh.topic}/{refresh.partition}: refresh complete", file=sys.stderr)


def line_of(record: Record, json_wanted: bool) -> bytes:
    """As it is for a file or a program; a terminal would obey what is in it."""
    if json_wanted:
        return as_json(record)
    value = record.value or b""
    if sys.stdout.isatty():
        value = printable(value.decode(errors="backslashreplace")).encode()
    return value + b"\n"


def as_json(record: Record) -> bytes:
    """A whole record as one line of JSON."""
    fields = {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp": record.timestamp,
        "key": _text(record.key),
        "value": _text(record.value),
        "headers": [[name, _text(value)] for name, value in record.headers],
    }
    return json_line(fields).encode() + b"\n"


def _text(data: bytes | None) -> object:
    """Bytes that are UTF-8 as text, others as {"base64": ...}."""
    if data is None:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def _report_gap(gap: GapError) -> None:
    print(f"edgebroker: {gap}", file=sys.stderr)
