"""Rows of a CSV file as RFC 4180 has them, read strictly: what looks damaged is an error with its line, never a guess.

A stray quote, a file that was transferred in part, a row with a column too many: with the rows of a table, each of them
would delete keys or give them other values.
"""

from __future__ import annotations

import csv
import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

from edgebroker.common.errors import ConfigError
from edgebroker.common.runtime.text_file import not_utf8

MAX_LINE_BYTES = 16 << 20
csv.field_size_limit(MAX_LINE_BYTES)


class Row(NamedTuple):
    """`line`: where it begins, from 1."""

    line: int
    fields: dict[str, str]


def read_rows(path: str, key_column: str | None = None, *, whole: bool = False) -> Iterator[Row]:
    """The rows of a file (gzipped when it is called .gz). With `whole` it must end with the end of a line.

    Raises ConfigError with file, line and remedy, perhaps after some rows: unreadable, not UTF-8, a quote that is not
    closed, another number of columns than the header has, a header without name or with one twice, a missing or empty
    key.
    """
    with _opened(path) as file:
        lines = _Lines(path, file)
        reader, line = csv.reader(lines, strict=True), 1
        try:
            header = next(reader, [])
            _check_header(path, header, key_column)
            line = lines.number + 1
            for fields in reader:
                if fields:
                    yield Row(line, _row(path, line, header, fields, key_column))
                line = lines.number + 1
        except csv.Error as error:
            raise ConfigError(f"{path}, line {line}: {_explain(error)}") from error
        if whole and not lines.ended:
            raise ConfigError(
                f"{path}, line {lines.number}: the file does not end with the end of a line, so it may be incomplete; "
                "transfer it again, or end its last line when it is complete"
            )


class _Lines:
    """The lines of a file as text; `number` counts them, `ended`: the last one was a whole line."""

    def __init__(self, path: str, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self.number = 0
        self.ended = True

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        data = self._file.readline(MAX_LINE_BYTES)
        if not data:
            raise StopIteration
        self.number += 1
        self.ended = data.endswith(b"\n")
        if len(data) >= MAX_LINE_BYTES and not self.ended:
            raise ConfigError(f"{self._path}, line {self.number}: longer than {MAX_LINE_BYTES >> 20} MiB")
        try:
            return data.decode("utf-8-sig" if self.number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise ConfigError(not_utf8(self._path, self.number, data[error.start])) from error


def _check_header(path: str, header: list[str], key_column: str | None) -> None:
    twice = sorted({name for name in header if header.count(name) > 1})
    if not header or "" in header:
        raise ConfigError(f"{path}, line 1: a header with a name for each column is expected")
    if twice:
        raise ConfigError(f"{path}, line 1: column {twice[0]!r} is there twice; give each column its own name")
    if key_column and key_column not in header:
        raise ConfigError(f"{path} has no column {key_column!r}; its columns are {', '.join(header)}")


def _row(path: str, line: int, header: list[str], fields: list[str], key_column: str | None) -> dict[str, str]:
    if len(fields) != len(header):
        raise ConfigError(
            f"{path}, line {line}: {len(fields)} columns, and the header has {len(header)}; look for a quote or a "
            "comma too many or too few, from this line on"
        )
    row = dict(zip(header, fields, strict=True))
    if key_column and not row[key_column]:
        raise ConfigError(f"{path}, line {line}: column {key_column!r} is empty; every row needs a key")
    return row


def _explain(error: csv.Error) -> str:
    if "unexpected end of data" in str(error):
        return "a quote is not closed; look for a stray one in this line"
    return f"{error}; a field with quotes, commas or line ends stands between quotes, a quote in it is doubled"


@contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    try:
        with gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb") as file:
            yield file  # type: ignore[misc]  # either reads bytes
    except (OSError, EOFError, zlib.error) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{path}: {why or error}") from error
