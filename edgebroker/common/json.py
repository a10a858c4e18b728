"""Decoding the JSON of others."""

from __future__ import annotations

from typing import TypeVar

import msgspec

T = TypeVar("T")


def decode(data: bytes | memoryview, kind: type[T]) -> T:
    """The JSON of a peer as a `kind`. Raises msgspec.DecodeError for everything else, however deeply it is nested."""
    try:
        return msgspec.json.decode(data, type=kind)
    except RecursionError as error:
        raise msgspec.DecodeError("it is nested too deeply") from error
