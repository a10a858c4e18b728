"""The one way in which stored batches are read: for a consumer, a child, a peer.

cached and verified -> a slice of the file, or memory      -> send it
cold, or first met  -> NeedsDisk -> Engine.read_cold()     -> send what comes
corrupt             -> CorruptRange                        -> wait, skip or refuse, as the reader's kind does
nothing more        -> None                                -> wait for on_durable()
"""

from __future__ import annotations

from typing import Protocol

from edgebroker.storage.engine import Log
from edgebroker.storage.types import FileSlice, Found, Inline, NeedsDisk


class ReadState(Protocol):
    """What a reader remembers from piece to piece."""

    hint: tuple[int, int] | None
    """FileSlice.next_hint of the piece before; None when that was none of a file."""
    fresh: bool
    """Nothing was read yet."""


def next_piece(log: Log, reader: ReadState, offset: int, max_bytes: int, max_records: int) -> Found:
    """What to do for a reader that is at `offset`, for at most max_bytes and max_records, but at least one batch.

    The first piece of a sealed segment is checked on the disk: what was verified once may have rotted since, and a
    reader that found it so comes again; it must not get the same bytes for ever.
    """
    found = log.find(offset, max_bytes, max_records, reader.hint)
    if not isinstance(found, FileSlice | Inline):
        return found
    fresh, reader.fresh = reader.fresh, False
    return NeedsDisk() if fresh and isinstance(found, FileSlice) and found.sealed else found


def size_of(piece: FileSlice | Inline) -> int:
    """The bytes of a piece."""
    return piece.length if isinstance(piece, FileSlice) else len(piece.data)
