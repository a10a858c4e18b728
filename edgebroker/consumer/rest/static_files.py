"""Files of a directory, sent piece by piece: a page beside the functions of an application."""

from __future__ import annotations

import mimetypes
import os
from pathlib import Path

from edgebroker.common.outcome import Outcome
from edgebroker.network.http.router import Call
from edgebroker.network.http.server import BYTES_TYPE, BodyWriter, Response
from edgebroker.network.io.loop import Loop

INDEX = "index.html"
PIECE_BYTES, MOST_OPEN = 64 << 10, 32
# They may be replaced at any time: a browser asks again.
HEADERS = (("cache-control", "no-cache"), ("x-content-type-options", "nosniff"))


class StaticFiles:
    """Belongs to the loop, which reads a piece in a turn. Neither what is outside of the directory is sent, nor names
    that begin with a dot."""

    def __init__(self, loop: Loop, directory: Path) -> None:
        self._loop, self._directory = loop, directory.resolve()
        self._bodies = set[FileBody]()

    def answer(self, call: Call) -> None:
        """Answer with the file that a path names."""
        path = self._find(call.parameters["path"])
        if path is None:
            call.refuse(Outcome.NOT_FOUND, f"there is no {call.path}")
        elif len(self._bodies) >= MOST_OPEN:
            why = f"{MOST_OPEN} files are being sent already; try again in a moment"
            call.refuse(Outcome.OVERLOADED, why, headers=(("retry-after", "1"),))
        else:
            kind = mimetypes.guess_type(path.name)[0] or BYTES_TYPE
            kind += "; charset=utf-8" if kind.startswith("text/") else ""
            call.answer(Response(200, FileBody(self._loop, path, self._bodies), HEADERS, kind))

    def _find(self, text: str) -> Path | None:
        parts = [part for part in text.split("/") if part]
        if any(part.startswith(".") or "\0" in part for part in parts):
            return None
        path = self._directory.joinpath(*parts)
        try:
            path = (path / INDEX if path.is_dir() else path).resolve()
            good = path.is_file() and path.is_relative_to(self._directory) and os.access(path, os.R_OK)
            return path if good else None
        except (OSError, RuntimeError):  # links that lead to each other
            return None


class FileBody:
    """The bytes of a file. `bodies` are those that are being sent."""

    def __init__(self, loop: Loop, path: Path, bodies: set[FileBody]) -> None:
        self._loop, self._path, self._bodies = loop, path, bodies
        self._fd, self._going = -1, False
        self._out: BodyWriter | None = None

    def begin(self, out: BodyWriter) -> None:
        try:
            # It may be a pipe by now, which would be waited for.
            self._fd = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            out.cut(f"{self._path} cannot be opened: {error.strerror}")
            return
        self._out = out
        self._bodies.add(self)
        self._go_on()

    def on_drained(self) -> None:
        self._go_on()

    def on_alive(self) -> None: ...

    def on_closed(self, reason: str) -> None:
        self._close()

    def _go_on(self) -> None:
        if not self._going and self._out is not None:
            self._going = True
            self._loop.call_in_turn(self._send)

    def _send(self) -> None:
        self._going = False
        out = self._out
        if out is None or out.closed or out.backlog >= PIECE_BYTES:
            return
        try:
            data = os.read(self._fd, PIECE_BYTES)
        except OSError as error:
            self._close()
            out.cut(f"{self._path} cannot be read: {error.strerror}")
            return
        if data:
            out.send(data)
            self._go_on()
        else:
            self._close()
            out.end()

    def _close(self) -> None:
        if self._out is not None:
            os.close(self._fd)
            self._out = None
            self._bodies.discard(self)
