"""Stored bytes on their way from a file to a socket."""

from __future__ import annotations

from collections.abc import Callable

from edgebroker.network.io.transport import FileRange
from edgebroker.storage.engine import LogReader
from edgebroker.storage.types import StoredFile

Supply = Callable[[FileRange, memoryview | None, str], None]
"""Where bytes that left the page cache go once they are read again: Transport.supply(), BodyWriter.supply()."""


def file_range(reader: LogReader, file: StoredFile, position: int, length: int, supply: Supply) -> FileRange:
    """Bytes to be sent from a file that the caller holds; it is released when they are sent."""

    def load(piece: FileRange) -> None:
        reader.load_range(
            file,
            piece.position,
            piece.length,
            lambda data, error: supply(piece, None if error else memoryview(data), error),
        )

    return FileRange(file.fd, position, length, file.release, load)
