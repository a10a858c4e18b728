"""The helper process of this node (trust/worker.py), as the loop sees it: tasks go in, results come back, in order.

It is started with the first task, and ended when there has been none for half a minute.
"""

from __future__ import annotations

import logging
import socket
import subprocess
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

import msgspec

from edgebroker.common import json
from edgebroker.common.runtime.program import TRUST_WORKER, program
from edgebroker.common.runtime.threads import Worker
from edgebroker.network.io.channel import PlainChannel
from edgebroker.network.io.loop import Loop, TimerHandle
from edgebroker.network.io.transport import Transport
from edgebroker.network.wire.connection import ReceiveBuffer
from edgebroker.trust.messages import Result, Task

log = logging.getLogger(__name__)

IDLE_SECONDS, TASK_SECONDS, END_SECONDS = 30.0, 180.0, 5.0
MOST_WAITING, MOST_RESULT_BYTES = 4096, 8 << 20
T = TypeVar("T")

OnResult = Callable[[Result], None]


class _Waiting(NamedTuple):
    task: Task
    told: OnResult


class TrustHelper:
    """Owned by the loop thread."""

    def __init__(self, loop: Loop, data_dir: Path) -> None:
        self._loop, self._data_dir = loop, data_dir
        self._worker: Worker | None = None
        self._transport: Transport | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = self._stopped = False
        self._waiting: deque[_Waiting] = deque()
        self._line = bytearray()
        self._timer: TimerHandle | None = None

    def do(self, task: Task, kind: type[T], done: Callable[[T | None, str, str], None]) -> None:
        """Have a task done: done(value, "", "") with its result of this kind, or done(None, why, code)."""

        def told(result: Result) -> None:
            if result.error:
                done(None, result.error, result.code)
                return
            try:
                value = json.decode(result.value, kind)
            except msgspec.DecodeError as error:
                done(None, f"the helper process said what is not understood: {error}", "SYSTEM")
            else:
                done(value, "", "")

        if self._stopped or len(self._waiting) >= MOST_WAITING:
            why = "the node is stopping" if self._stopped else f"{MOST_WAITING} tasks wait for the helper process"
            self._loop.call_later(0.0, lambda: told(Result(error=why, code="OVERLOADED")))
            return
        self._waiting.append(_Waiting(task, told))
        if self._transport is None:
            self._start()
        elif len(self._waiting) == 1:
            self._next()

    def stop(self) -> None:
        """End it; what waits is told so."""
        self._stopped = True
        self._end("the node is stopping")
        if self._worker is not None:
            self._worker.stop(2 * END_SECONDS)

    def _start(self) -> None:
        """By a thread: to start a process may take a while."""
        if self._starting:
            return
        self._starting = True
        if self._worker is None:
            self._worker = Worker("trust")

        def work() -> None:
            ours, theirs = socket.socketpair()
            process: subprocess.Popen[bytes] | None = None
            try:
                process = subprocess.Popen(
                    [*program(), TRUST_WORKER, str(self._data_dir)], stdin=theirs.fileno(), stdout=theirs.fileno()
                )
            except OSError as error:
                log.error("the helper process cannot be started: %s", error.strerror)
                ours.close()
            theirs.close()
            self._loop.call_soon_threadsafe(lambda: self._started(ours, process))

        self._worker.submit(work)

    def _started(self, ours: socket.socket, process: subprocess.Popen[bytes] | None) -> None:
        self._starting = False
        if process is None:
            self._end("the helper process cannot be started; see the log of the node")
            return
        self._process = process
        self._transport = Transport(self._loop, PlainChannel(ours), ReceiveBuffer(64 << 10), self, "helper")
        if self._stopped:
            self._end("the node is stopping")
        else:
            self._next()

    def _next(self) -> None:
        """Give it the next task, or a rest."""
        self._cancel()
        if self._transport is None:
            return
        if self._waiting:
            self._transport.send(msgspec.json.encode(self._waiting[0].task) + b"\n")
            self._timer = self._loop.call_later(TASK_SECONDS, lambda: self._end("the helper process does not answer"))
        else:
            self._timer = self._loop.call_later(IDLE_SECONDS, lambda: self._end(""))

    def _end(self, why: str) -> None:
        self._cancel()
        transport, self._transport = self._transport, None
        process, self._process = self._process, None
        self._line = bytearray()
        if transport is not None:
            transport.close(why or "there is nothing to do")
        if process is not None and self._worker is not None:
            self._worker.submit(lambda: _reap(process))
        waiting, self._waiting = self._waiting, deque()
        for one in waiting:
            one.told(Result(error=why, code="SYSTEM"))

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ---- the transport's owner ----

    def on_data(self, buffer: ReceiveBuffer, received: int) -> None:
        self._line += buffer.room[:received]
        while (end := self._line.find(b"\n")) >= 0 and self._waiting:
            line, self._line = bytes(self._line[:end]), self._line[end + 1 :]
            try:
                result = json.decode(line, Result)
            except msgspec.DecodeError as error:
                result = Result(error=f"the helper process said what is not understood: {error}", code="SYSTEM")
            told = self._waiting.popleft().told
            self._next()
            told(result)
        if len(self._line) > MOST_RESULT_BYTES:
            self._end("the helper process says too much")

    def on_drained(self) -> None:
        pass

    def on_closed(self, reason: str) -> None:
        if self._transport is not None:
            self._end("the helper process ended")


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Its input has ended, and so does it; one that does not is killed."""
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
