"""Text that people wrote, in files: UTF-8, with or without a byte order mark, whatever the locale says."""

from __future__ import annotations

from pathlib import Path

from edgebroker.common.errors import ConfigError


def read_text(path: Path) -> str:
    """The whole file. Raises OSError; ConfigError for what is not UTF-8, with the line."""
    data = path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(not_utf8(str(path), data.count(b"\n", 0, error.start) + 1, data[error.start])) from error


def not_utf8(path: str, line: int, byte: int) -> str:
    return f"{path}, line {line}: the byte 0x{byte:02x} is not UTF-8; save the file as UTF-8"
