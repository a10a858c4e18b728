"""The identity of a log: one small file per partition, replaced durably before anything that depends on it.

line 1   JSON: log_id, origin (node uid), epochs [[epoch, first offset], ...], log_start, chain, settings
line 2   CRC-32C of line 1 as eight hex digits
"""

import os
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec.structs import replace

from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import DamagedDataError
from edgebroker.common.types import TopicSettings
from edgebroker.storage.checksummed import read_checked, write_checked

FILE_NAME = "identity"


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """Who made this log, its histories, and where it begins now. `chain` is the chain checksum at `log_start`;
    `snapshot` is where the newest complete snapshot of a table begins and ends (-1: there is none)."""

    log_id: str
    origin: str
    epochs: list[tuple[int, int]]
    log_start: int
    chain: int
    settings: TopicSettings
    snapshot: tuple[int, int] = (-1, -1)

    @property
    def epoch(self) -> int:
        return self.epochs[-1][0]

    def epoch_at(self, offset: int) -> int:
        """The history that an offset belongs to."""
        return max((epoch for epoch, first in self.epochs if first <= offset), default=0)

    def contains(self, epoch: int, next_offset: int) -> bool:
        """True when a reader of that history could have come to next_offset by what this log holds: the history did
        not end before. An epoch of -1 is any, one that this log has not reached yet is no contradiction."""
        later = [first for known, first in self.epochs if known > epoch]
        return epoch < 0 or not later or next_offset <= min(later)

    @property
    def log_id_bytes(self) -> bytes:
        return bytes.fromhex(self.log_id)


def begin_history(identity: Identity, end: int) -> Identity:
    """The identity of a log that goes on at `end` in a new history. Histories that begin behind that are over before
    they began: nothing of them is here."""
    lived = [(epoch, first) for epoch, first in identity.epochs if first <= end]
    return replace(identity, epochs=[*lived, (identity.epoch + 1, end)])


def make_identity(origin: str, settings: TopicSettings) -> Identity:
    """A new log of this node: a fresh log_id, epoch 1 from offset 0, the chain that begins with the log_id."""
    log_id = os.urandom(16)
    return Identity(
        log_id=log_id.hex(), origin=origin, epochs=[(1, 0)], log_start=0, chain=crc32c(log_id), settings=settings
    )


def write_identity(directory: Path, identity: Identity, name: str = FILE_NAME) -> None:
    """Replace the identity file; durable when this returns."""
    write_checked(directory / name, identity)


def change_identity(directory: Path, change: Callable[[Identity], Identity]) -> Identity:
    """Read, change, write durably; on the commit thread, where no other change can come in between."""
    identity = change(read_identity(directory))
    write_identity(directory, identity)
    return identity


def read_identity(directory: Path, name: str = FILE_NAME) -> Identity:
    """Raises FileNotFoundError when there is none, DamagedDataError when it is not what was written."""
    identity = read_checked(directory / name, Identity)
    if not identity.epochs:
        raise DamagedDataError(f"{directory / name}: a log without a history")
    return identity
