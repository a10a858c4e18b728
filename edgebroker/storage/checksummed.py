"""Small files that are replaced as a whole: a line of JSON, then its CRC-32C as eight hex digits on another one."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TypeVar

import msgspec

from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import DamagedDataError
from edgebroker.storage import files

log = logging.getLogger(__name__)

T = TypeVar("T")


def write_checked(path: Path, value: object) -> None:
    """Replace the file; durable when this returns. Raises OSError."""
    line = msgspec.json.encode(value)
    files.write_durable(path, line + b"\n%08x\n" % crc32c(line))


def read_checked(path: Path, kind: type[T]) -> T:
    """What was written. Raises FileNotFoundError, another OSError, or DamagedDataError when it is not that."""
    line, _, checksum = path.read_bytes().partition(b"\n")
    try:
        if int(checksum, 16) != crc32c(line):
            raise DamagedDataError(f"{path}: the checksum does not match")
        return msgspec.json.decode(line, type=kind)
    except (ValueError, msgspec.DecodeError) as error:
        raise DamagedDataError(f"{path}: {error}") from error


def read_if_whole(path: Path, kind: type[T], otherwise: T) -> T:
    """The same for a file that one can do without: `otherwise` when it is missing or damaged (which is logged)."""
    try:
        return read_checked(path, kind)
    except FileNotFoundError:
        return otherwise
    except (OSError, DamagedDataError) as error:
        log.error("%s cannot be used: %s", path, error)
        return otherwise
