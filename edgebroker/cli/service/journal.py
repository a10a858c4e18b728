"""Where log lines go: to the journal by its native protocol (systemd.journal-fields(7)) when standard error is the
journal, else to standard error, as text or as JSON.

A line has a level, the node, its topic and partition (taken from lines that begin with `topic NAME` or
`NAME/PARTITION`), and the name of the problem that it reports. It never contains keys or values of records. A line is
written at most BURST times in WINDOW_SECONDS, whatever its arguments; the rest is counted, and the first line after the
window says how many were suppressed.
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

from edgebroker.common.runtime.clock import Clock

BURST, WINDOW_SECONDS = 20, 10.0
JOURNAL = "/run/systemd/journal/socket"
MOST_BYTES = 48 << 10
_SUBJECT = re.compile(r"(?:topic )?([A-Za-z0-9._-]{1,200})(?:/(\d+))?(?=[ :])")
_PRIORITIES = {logging.CRITICAL: 2, logging.ERROR: 3, logging.WARNING: 4, logging.INFO: 6, logging.DEBUG: 7}


def set_up(level: str, form: str, node: str, clock: Clock, environment: Mapping[str, str]) -> None:
    """Configure the logging of this process. `form` is auto, text or json."""
    handler: logging.Handler
    if form == "auto" and stderr_is_the_journal(environment):
        handler = JournalHandler(node)
    else:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(JsonFormatter(node) if form == "json" else TextFormatter())
    handler.addFilter(RateLimit(clock))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


def stderr_is_the_journal(environment: Mapping[str, str]) -> bool:
    """True when $JOURNAL_STREAM, which systemd sets to device:inode of the journal, is our standard error."""
    device, _, inode = environment.get("JOURNAL_STREAM", "").partition(":")
    try:
        found = os.fstat(sys.stderr.fileno())
    except (OSError, ValueError):
        return False
    return (device, inode) == (str(found.st_dev), str(found.st_ino))


class RateLimit(logging.Filter):
    """Passes BURST lines of a kind per window. It takes no lock: a race between threads costs one line at most."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock
        self._seen: dict[tuple[str, str], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now, kind = self._clock.monotonic(), (record.name, str(record.msg))
        since, count = self._seen.get(kind, (now, 0))
        suppressed = max(0, count - BURST)
        if now - since >= WINDOW_SECONDS:
            since, count = now, 0
            if suppressed:
                record.msg = f"{record.getMessage()} ({suppressed} similar lines suppressed)"
                record.args = None
        self._seen[kind] = (since, count + 1)
        if len(self._seen) > 1000:
            self._seen.clear()
        return count < BURST


def fields_of(record: logging.LogRecord, node: str) -> dict[str, str]:
    """The fields of a line besides its text."""
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
    """Sends datagrams with MESSAGE, PRIORITY, EB_NODE, EB_TOPIC, EB_PARTITION, EB_PROBLEM and EB_LOGGER.

    A line that the journal does not accept goes to standard error, prefixed with its priority (sd-daemon(3)).
    """

    def __init__(self, node: str) -> None:
        super().__init__()
        self._node = node
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)  # the event loop logs and must not block

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
    """NAME=value or, for a value with a line break, NAME, the length as 64 bits, and the value."""
    if b"\n" in value:
        return name.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"
    return name.encode() + b"=" + value + b"\n"
