"""Handlers that are `async`: an asyncio loop on a thread of its own, while the worker waits for the result."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from edgebroker.common.runtime.threads import start_thread

if TYPE_CHECKING:
    import asyncio


class Tasks:
    """One task at a time; what tasks begin beside goes on between them. The thread begins with the first task."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None

    def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Wait until it is done. Raises what it raises; asyncio.CancelledError after cancel()."""
        if self._loop is None:
            import asyncio

            self._loop = asyncio.new_event_loop()
            start_thread("edgebroker-asyncio", self._loop.run_forever)
        loop, done, failures = self._loop, threading.Event(), list[BaseException]()

        async def watched() -> None:
            try:
                await work()
            except BaseException as error:
                failures.append(error)
            finally:
                done.set()

        def begin() -> None:
            self._task = loop.create_task(watched())

        loop.call_soon_threadsafe(begin)
        done.wait()
        if failures:
            raise failures[0]

    def cancel(self) -> None:
        """Ask what is running to end. Any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(lambda: self._task.cancel() if self._task is not None else None)
