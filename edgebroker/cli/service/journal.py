"""Where the node's log lines go: the journal's native protocol (systemd.journal-fields(7)) when standard error is the
journal, else standard error as text, or as JSON for containers.

A line has a level, the node, the topic and partition where it is about one (such lines begin with `topic NAME` or
`NAME/PARTITION`), and the name of the problem with what to do. Payloads and keys of records never stand in it. The same
line (before its arguments are put in) is written BURST times in WINDOW_SECONDS; then it is counted, and the next one
behind the window says how many there were.
"""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
from collections.abc import Mapping
from datetime import UTC, datetime

from edgebroker.common.clock import Clock

BURST, WINDOW_SECONDS = 20, 10.0
JOURNAL = "/run/systemd/journal/socket"
MOST_BYTES = 48 << 10
_SUBJECT = re.compile(r"(?:topic )?([A-Za-z0-9._-]{1,200})(?:/(\d+))?(?=[ :])")
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


def set_up(level: str, form: str, node: str, clock: Clock, environment: Mapping[str, str]) -> None:
    """Send all log lines of this process to where they belong. `form`: auto, text or json."""
    handler: logging.Handler
    if form == "auto" and stderr_is_the_journal(environment):
        handler = JournalHandler(node)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter(node) if form == "json" else TextFormatter())
    handler.addFilter(RateLimit(clock))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def stderr_is_the_journal(environment: Mapping[str, str]) -> bool:
    """As systemd tells it: $JOURNAL_STREAM is device:inode of the stream."""
    device, _, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


class RateLimit(logging.Filter):
    """Lets BURST lines of a kind through in a window. Called under the handler's lock or not: a race costs a line."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now, kind = self._clock.monotonic(), (record.name, str(record.msg))
        since, count = self._seen.get(kind, (now, 0))
        left_out = max(0, count - BURST)
        if now - since >= WINDOW_SECONDS:
            since, count = now, 0
            if left_out:
                record.msg = f"{record.getMessage()} (and {left_out} more lines like this in the last while)"
                record.args = None
        self._seen[kind] = (since, count + 1)
        if len(self._seen) > 1000:
            self._seen.clear()
        return count < BURST


def fields_of(record: logging.LogRecord, node: str) -> dict[str, str]:
    """What a line says besides its text."""
    text = record.getMessage()
    found = {"node": node, "logger": record.name}
    subject = _SUBJECT.match(text)
    if subject is not None and (subject[2] is not None or text.startswith("topic ")):
        found["topic"] = subject[1]
        if subject[2] is not None:
            found["partition"] = subject[2]
    problem = getattr(record, "problem", "")
    return {**found, "problem": problem} if problem else found


def text_of(record: logging.LogRecord) -> str:
    text = record.getMessage()
    return f"{text}\n{logging.Formatter().formatException(record.exc_info)}" if record.exc_info else text


class TextFormatter(logging.Formatter):
    """`2026-01-01 12:00:00,000 WARNING edgebroker.storage.files: text`"""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s")


class JsonFormatter(logging.Formatter):
    """One object a line: time (UTC), level, message and fields_of()."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {"time": when, "level": record.levelname.lower(), "message": text_of(record)}
        return json.dumps({**line, **fields_of(record, self._node)}, ensure_ascii=False)


class JournalHandler(logging.Handler):
    """Datagrams to the journal: MESSAGE, PRIORITY, EB_NODE, EB_TOPIC, EB_PARTITION, EB_PROBLEM, EB_LOGGER. When the
    journal does not take one, the line goes to standard error with its priority in front (sd-daemon(3))."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)  # the loop logs: it waits for nobody

    def emit(self, record: logging.LogRecord) -> None:
        text = text_of(record)[:MOST_BYTES]
        priority = _PRIORITIES.get(record.levelno, 6)
        fields = {"MESSAGE": text, "PRIORITY": str(priority), "SYSLOG_IDENTIFIER": "edgebroker"}
        fields.update({f"EB_{name.upper()}": value for name, value in fields_of(record, self._node).items()})
        try:
            self._socket.sendto(b"".join(_field(name, value.encode()) for name, value in fields.items()), JOURNAL)
        except OSError:
            sys.stderr.write(f"<{priority}>{text}\n")

    def close(self) -> None:
        self._socket.close()
        super().close()


def _field(name: str, value: bytes) -> bytes:
    """NAME=value; with a line break in it: NAME, its length as 64 bits, value."""
    if b"\n" in value:
        return name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
    return name.encode() + b"=" + value + b"\n"
