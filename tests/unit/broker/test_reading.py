"""The read ladder: what a reader that begins gets checked on the disk, and when that is over."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from edgebroker.broker.reading import next_piece
from edgebroker.storage.engine import Log
from edgebroker.storage.types import CorruptRange, FileSlice, Found, Inline, NeedsDisk


class Reader:
    hint: tuple[int, int] | None = None
    fresh = True


def log_of(*found: Found) -> Log:
    answers = iter(found)
    return cast(Log, SimpleNamespace(find=lambda *_: next(answers)))


def piece(sealed: bool) -> FileSlice:
    fields: dict[str, Any] = dict.fromkeys(FileSlice._fields, 0)
    return FileSlice(**{**fields, "sealed": sealed})


def read(log: Log, reader: Reader) -> Found:
    return next_piece(log, reader, 0, 100, 100)


def test_the_first_sealed_piece_comes_from_the_disk_and_the_next_from_the_cache() -> None:
    reader, log = Reader(), log_of(piece(True), piece(True))
    assert isinstance(read(log, reader), NeedsDisk)
    assert read(log, reader) == piece(True)


@pytest.mark.parametrize("nothing", [None, NeedsDisk(), CorruptRange(0, 5)])
def test_what_is_no_piece_does_not_count_as_the_first_one(nothing: Found) -> None:
    reader, log = Reader(), log_of(nothing, piece(True))
    assert read(log, reader) == nothing
    assert isinstance(read(log, reader), NeedsDisk)
    assert not reader.fresh


def test_the_active_segment_and_memory_need_no_check() -> None:
    inline: dict[str, Any] = dict.fromkeys(Inline._fields, 0)
    for first in (piece(False), Inline(**inline)):
        reader, log = Reader(), log_of(first, piece(True))
        assert read(log, reader) == first
        assert read(log, reader) == piece(True)
