"""A file that says which records handlers have in hand: what a process was doing when it died.

After a death these records are handled one at a time. So the one that ends the process, a crash in a library or a
thread that nothing ends, is found, and given up when it has done it twice alone. The file is not synced: a power cut is
no fault of a record.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import msgspec

from edgebroker.common.records import Record
from edgebroker.common.types import TopicPartition
from edgebroker.storage import files

NAME = "IN_HAND"
MOST_DEATHS = 2
MOST_BYTES = 1 << 20


class Stretch(msgspec.Struct, array_like=True):
    """Records of a partition, [first, last]; of a single one, how often the process died with it."""

    topic: str
    partition: int
    first: int
    last: int
    deaths: int = 0


class InHand:
    """Belongs to the thread of the database."""

    def __init__(self, directory: Path) -> None:
        path = directory / NAME
        files.make_private(path)
        self._fd = files.open_log(path, writable=True)
        self._suspects: dict[TopicPartition, Stretch] = {}
        for one in self._read():
            deaths = one.deaths + 1 if one.first == one.last else 0
            self._suspects[TopicPartition(one.topic, one.partition)] = msgspec.structs.replace(one, deaths=deaths)

    def _read(self) -> list[Stretch]:
        line = files.read_at(self._fd, MOST_BYTES, 0).partition(b"\n")[0]
        try:
            return msgspec.json.decode(line, type=list[Stretch])
        except msgspec.DecodeError:
            return []  # nothing was in hand, or a power cut left a part of it

    def begin(self, taken: Iterable[tuple[TopicPartition, Sequence[Record]]]) -> None:
        """Handlers get these records now."""
        stretches = []
        for key, records in taken:
            first, last = records[0].offset, records[-1].offset
            stretches.append(Stretch(*key, first, last, self.deaths(key, records[0]) if first == last else 0))
        self._write(msgspec.json.encode(stretches) + b"\n")

    def end(self) -> None:
        """They have them no more."""
        self._write(b"\n")

    def _write(self, data: bytes) -> None:
        # A hint: where it cannot be written, a full disk is told by what has to be stored.
        with suppress(OSError):
            files.write_at(self._fd, memoryview(data), 0)

    def __bool__(self) -> bool:
        """Are there records that have to be handled one at a time?"""
        return bool(self._suspects)

    def together(self, key: TopicPartition, records: Sequence[Record]) -> int:
        """How many of these records, the next of their partition, may be handled together."""
        suspect = self._suspects.get(key)
        if suspect is None:
            return len(records)
        first = records[0].offset
        if first > suspect.last:
            del self._suspects[key]
            return len(records)
        if first >= suspect.first:
            return 1
        return sum(record.offset < suspect.first for record in records)

    def deaths(self, key: TopicPartition, record: Record) -> int:
        """How often the process died while it handled this record alone."""
        suspect = self._suspects.get(key)
        if suspect is None or suspect.first != suspect.last or suspect.first != record.offset:
            return 0
        return suspect.deaths

    def close(self) -> None:
        files.close(self._fd)
