"""What a caller may give to a client. Whatever is wrong is one sentence, in the caller's thread."""

from __future__ import annotations

from collections.abc import Sequence

from edgebroker.common.errors import ArgumentError
from edgebroker.common.names import is_name
from edgebroker.common.types import Start

# Where reading begins: a word, an offset, or "@TIME" in milliseconds since 1970.
StartFrom = str | int
MOST_OFFSET = (1 << 63) - 1
MOST_WINDOW = (1 << 32) - 1
MOST_PARTITION = (1 << 31) - 1
MOST_NAME_BYTES = 200
_NAMED = {"committed": Start.COMMITTED, "earliest": Start.EARLIEST, "latest": Start.LATEST}


def check_topics(topics: Sequence[str]) -> list[str]:
    """The names of topics to read. Raises TypeError or ArgumentError."""
    if isinstance(topics, str):
        raise TypeError(f"topics is a sequence of names, not one name; write [{topics!r}]")
    found = list(topics)
    if not found:
        raise ArgumentError("topics is empty; name at least one topic to consume")
    for topic in found:
        check_topic(topic)
    return found


def check_topic(topic: str) -> None:
    """Raises TypeError or ArgumentError for what no topic can be called."""
    if not isinstance(topic, str):
        raise TypeError(f"the name of a topic is a str, not {topic!r}")
    if not is_name(topic):
        raise ArgumentError(f"topic names are 1 to 200 of A-Z a-z 0-9 . _ -, and not . or ..; {topic!r} is not")


def check_client_id(client_id: str) -> None:
    """Raises TypeError or ArgumentError."""
    if not isinstance(client_id, str):
        raise TypeError(f"client_id is a str, not {client_id!r}")
    if len(client_id.encode(errors="surrogatepass")) > MOST_NAME_BYTES or not client_id.isprintable():
        raise ArgumentError(f"client_id is up to {MOST_NAME_BYTES} bytes of printable text; {client_id[:50]!r} is not")


def check_whole(name: str, value: int, least: int, most: int) -> None:
    """Raises TypeError or ArgumentError for what is not a whole number from `least` to `most`."""
    if not isinstance(value, int):
        raise TypeError(f"{name} is a whole number, not {value!r}")
    if not least <= value <= most:
        raise ArgumentError(f"{name} is a whole number from {least} to {most}, not {value}")


def check_time(name: str, value: float | None, unit: str = "seconds") -> None:
    """Raises TypeError or ArgumentError for what is neither None nor a time from 0 on."""
    if value is None:
        return
    if not isinstance(value, int | float):
        raise TypeError(f"{name} is a number of {unit}, not {value!r}")
    if not 0 <= value < float("inf"):
        raise ArgumentError(f"{name} is a number of {unit} from 0 on, not {value}; None stands for no limit")


def parse_from(value: StartFrom) -> tuple[Start, int]:
    """earliest, latest, committed, an offset, or @TIME in milliseconds since 1970. Raises ArgumentError."""
    if isinstance(value, str) and value in _NAMED:
        return _NAMED[value], 0
    text = str(value)
    digits = text.removeprefix("@").removeprefix("-") if text.startswith("@") else text
    if digits.isascii() and digits.isdigit() and int(digits[:20]) <= MOST_OFFSET:
        return (Start.TIME, int(text[1:])) if text.startswith("@") else (Start.OFFSET, int(text))
    raise ArgumentError(f"{value!r}: use earliest, latest, committed, an offset, or @TIME in ms since 1970")
