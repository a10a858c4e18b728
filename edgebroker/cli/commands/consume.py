"""`edgebroker consume`: values to stdout, one a line; with --json everything about each record."""

from __future__ import annotations

import argparse
import base64
import json
import sys
from collections.abc import Sequence

from edgebroker.client.consumer import Consumer, parse_from
from edgebroker.client.refresh import Refresh
from edgebroker.common.errors import ConfigError, GapError
from edgebroker.common.records import Record


def consume(options: argparse.Namespace) -> int:
    try:
        parse_from(options.start)
    except ValueError as error:
        raise ConfigError(f"--from {error}") from error
    seen = 0
    with Consumer(
        options.server,
        options.topic,
        options.group,
        start=options.start,
        on_gap=_tell_gap,
        timeout=options.timeout or 30.0,
        auto_ack=False,
        staging=Printed(options.json),
    ) as consumer:
        while not options.count or seen < options.count:
            records = consumer.poll(options.timeout or None)
            if not records:
                print(f"edgebroker: nothing came for {options.timeout:g} s", file=sys.stderr)
                return 1
            if options.count:
                records = records[: options.count - seen]
            sys.stdout.buffer.write(b"".join(line_of(record, options.json) for record in records))
            sys.stdout.buffer.flush()
            seen += len(records)
            # Printed is handled: acknowledge what went out, not what is still in hand.
            consumer.ack(records[-1])
        consumer.commit()
    return 0


class Printed:
    """A refresh of a group that only prints: everything is printed again."""

    def __init__(self, json_wanted: bool) -> None:
        self._json = json_wanted

    def begin(self, refresh: Refresh) -> int:
        print(f"edgebroker: {refresh.topic}/{refresh.partition} is read again, to {refresh.target}", file=sys.stderr)
        return refresh.from_offset

    def load(self, refresh: Refresh, records: Sequence[Record]) -> None:
        sys.stdout.buffer.write(b"".join(line_of(record, self._json) for record in records))
        sys.stdout.buffer.flush()

    def switch(self, refresh: Refresh) -> None:
        print(f"edgebroker: {refresh.topic}/{refresh.partition} is refreshed", file=sys.stderr)


def line_of(record: Record, json_wanted: bool) -> bytes:
    return as_json(record) if json_wanted else (record.value or b"") + b"\n"


def as_json(record: Record) -> bytes:
    """Everything about a record, as one line."""
    fields = {
        "topic": record.topic,
        "partition": record.partition,
        "offset": record.offset,
        "timestamp": record.timestamp,
        "key": _text(record.key),
        "value": _text(record.value),
        "headers": [[name, _text(value)] for name, value in record.headers],
    }
    return json.dumps(fields, ensure_ascii=False).encode() + b"\n"


def _text(data: bytes | None) -> object:
    """Bytes as text where they are UTF-8, else as {"base64": ...}."""
    if data is None:
        return None
    try:
        return data.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(data).decode()}


def _tell_gap(gap: GapError) -> None:
    print(f"edgebroker: {gap}", file=sys.stderr)
