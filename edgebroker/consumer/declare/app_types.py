"""Applications that need no code: what they do is a key of the configuration.

store    the latest value of each key, as it is        table    with columns, and indexes over them
stdout   each record as a line of JSON
"""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Sequence
from typing import Any

import msgspec

from edgebroker.common.config import split_list
from edgebroker.common.errors import ConfigError
from edgebroker.common.names import check_topic_name
from edgebroker.common.records import Record
from edgebroker.consumer.declare.application import Application, Handler, Topic
from edgebroker.consumer.declare.columns import Column, Columns
from edgebroker.consumer.declare.declarations import RetryPolicy
from edgebroker.consumer.declare.signatures import read_signature

TYPES = ("store", "table", "stdout")
BATCH = 1000
_KINDS: dict[str, Any] = {"text": str, "integer": int, "real": float, "boolean": bool, "json": Any}
_COLUMN = re.compile(r"([A-Za-z_]\w*)\s+(\w+)(\s*\?)?\Z")


class WholeValue(Columns):
    """One column, `value`: the JSON of the record."""

    def __init__(self) -> None:
        self.kind, self.indexes = msgspec.Raw, ()
        self.columns = [Column("value", "TEXT", None, None, "value")]
        self.row = lambda raw: (bytes(raw).decode(),)

    def value(self, row: Sequence[Any]) -> Any:
        return msgspec.Raw(row[0].encode())


def application_of(kind: str, topics: str, columns: str, indexes: str) -> Application:
    """The application of a type. Topics and columns have commas between them, indexes semicolons. Raises ConfigError
    with everything that is wrong."""
    problems = [f"topics: {name}: {why}" for name in split_list(topics) if (why := check_topic_name(name))]
    if not split_list(topics):
        problems.append(f"topics: type = {kind} needs the topics that it reads, with commas between them")
    view: Columns | None = None
    if kind == "store":
        view = WholeValue()
    elif kind == "table":
        view = _table(columns, indexes, problems)
    if kind != "table" and (columns or indexes):
        problems.append(f"columns and indexes are for type = table, not for {kind}")
    if problems:
        raise ConfigError("\n".join(problems))
    handlers = [_printing()] if kind == "stdout" else []
    found = {name: Topic(name, "each", "earliest", view, list(handlers)) for name in split_list(topics)}
    return Application(found, [], [])


def _table(columns: str, indexes: str, problems: list[str]) -> Columns | None:
    fields: list[tuple[Any, ...]] = []
    for text in split_list(columns):
        matched = _COLUMN.match(text)
        if matched is None or matched[2].lower() not in _KINDS:
            problems.append(
                f"columns: {text!r}: write NAME and one of {', '.join(_KINDS)}; a ? behind it: it may be missing"
            )
            continue
        kind = _KINDS[matched[2].lower()]
        fields.append((matched[1], kind | None, None) if matched[3] else (matched[1], kind))
    if not fields:
        problems.append("columns: type = table needs them, for example: code text, cents integer, name text ?")
        return None
    try:
        struct = msgspec.defstruct("Row", sorted(fields, key=len), module=__name__)
        wanted = [tuple(split_list(one)) for one in indexes.split(";") if one.strip()]
        return Columns(struct, wanted)
    except TypeError as error:
        problems.append(f"columns: {error}")
        return None


def _printing() -> Handler:
    """Prints records; it stops when nobody reads them."""

    def write(records: list[Record]) -> None:
        lines = b"".join(msgspec.json.encode(_line(record)) + b"\n" for record in records)
        sys.stdout.buffer.write(lines)
        sys.stdout.buffer.flush()

    policy = RetryPolicy(max_attempts=1, then="stop")
    return Handler("*", (), BATCH, 30.0, read_signature(write, {}), policy, write, "standard output")


def _line(record: Record) -> dict[str, Any]:
    found: dict[str, Any] = {
        "topic": record.topic, "partition": record.partition, "offset": record.offset, "timestamp": record.timestamp
    }  # fmt: skip
    for name, data in (("key", record.key), ("value", record.value)):
        try:
            found[name] = data.decode() if data is not None else None
        except UnicodeDecodeError:
            assert data is not None
            found[name], found[f"{name}_bytes"] = None, base64.b64encode(data).decode()
    return found
