"""A consumer's own positions in a file: what it has acknowledged, per topic and partition, kept beside its data.

JSON: {"positions": [{"topic", "partition", "log_id" (hex), "epoch", "next_offset"}, ...]}. Replaced as a whole; after a
power cut it holds what it held before or after, never half.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec

from edgebroker.common.errors import PositionFileError
from edgebroker.common.runtime.durable import write_durable
from edgebroker.common.types import Position


class _Line(msgspec.Struct):
    topic: str
    partition: int
    log_id: str
    epoch: int
    next_offset: int


class _File(msgspec.Struct):
    positions: list[_Line]


class PositionFile:
    """One file, one consumer at a time."""

    def __init__(self, path: str | Path) -> None:
        self._path = Path(path)
        self._written: dict[tuple[str, int], Position] = {}

    def read(self) -> dict[tuple[str, int], Position]:
        """What was stored last; empty when there is no file yet. Raises PositionFileError for one that is not valid."""
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=_File)
            self._written = {
                (line.topic, line.partition): Position(bytes.fromhex(line.log_id), line.epoch, line.next_offset)
                for line in found.positions
            }
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, msgspec.DecodeError) as error:
            raise PositionFileError(
                f"the position file {self._path} cannot be read ({error}); restore it together with the data that "
                "belongs to it, or remove both and load again"
            ) from error
        return dict(self._written)

    def update(self, moved: Mapping[tuple[str, int], Position]) -> None:
        """Store these positions, beside those of other partitions; durable when this returns. Nothing is written when
        none of them moved."""
        positions = {**self._written, **moved}
        if positions == self._written:
            return
        lines = [
            _Line(topic, partition, position.log_id.hex(), position.epoch, position.next_offset)
            for (topic, partition), position in positions.items()
        ]
        write_durable(self._path, msgspec.json.encode(_File(lines)) + b"\n")
        self._written = positions
