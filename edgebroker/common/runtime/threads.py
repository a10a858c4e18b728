"""The one place that makes threads, and the door through which they talk to the loop.

A Worker owns one thread and runs closures in the order they were given. Results come back by `post`, the loop's
call_soon_threadsafe: the threads share nothing, they exchange closures.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable

log = logging.getLogger(__name__)


def start_thread(name: str, target: Callable[[], None]) -> threading.Thread:
    """Start a daemon thread; `name` shows in stack dumps and in /proc."""
    thread = threading.Thread(target=target, name=name, daemon=True)
    thread.start()
    return thread


class Worker:
    """One thread and its queue of closures. submit() is callable from any thread; closures run one at a time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: deque[Callable[[], None] | None] = deque()
        self._ready = threading.Semaphore(0)
        self._thread = start_thread(f"edgebroker-{name}", self._run)

    def submit(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        self._ready.release()

    def stop(self, timeout: float) -> bool:
        """Run what was submitted, then end the thread. False when it did not end within `timeout` seconds."""
        self._jobs.append(None)
        self._ready.release()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while True:
            self._ready.acquire()
            job = self._jobs.popleft()
            if job is None:
                return
            try:
                job()
            except BaseException:  # also SystemExit: others wait for this thread
                log.exception("a job of the %s thread failed", self._name)
