"""The loop's side of meta.db, offsets.snap and children.snap: collects changes, hands them to the metadata thread,
keeps time.

A change is stored at once when the thread is idle, else together with the others at most 50 ms later. While the
database cannot be written, changes are kept and tried again every second; offsets.snap continues meanwhile.
"""

import logging
import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec

from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler, Timer
from edgebroker.common.runtime.threads import Worker
from edgebroker.storage.metadata.children import read_children, write_children
from edgebroker.storage.metadata.meta_db import (
    MetaChanges,
    MetaDatabase,
    MetaState,
    newest_offsets,
    read_offsets_snapshot,
    write_offsets_snapshot,
)
from edgebroker.storage.types import Children, GroupKey, GroupOffset

log = logging.getLogger(__name__)

BUSY_SECONDS = 0.04
RETRY_SECONDS = 1.0
SNAPSHOT_SECONDS = 4.0


class Metadata:
    """`changes` may be filled by the loop at any time; call touch() afterwards. `failed` says why writing fails now."""

    def __init__(self, directory: Path, scheduler: Scheduler, clock: Clock) -> None:
        self._scheduler = scheduler
        self._database = MetaDatabase(directory / "meta.db", clock)
        self._snapshot_path, self._children_path = directory / "offsets.snap", directory / "children.snap"
        self._worker = Worker("metadata")
        self.changes = MetaChanges()
        self.group_offsets: dict[GroupKey, GroupOffset] = {}
        self.children: Children = {}
        self._revision = 0
        self._deleted: list[GroupKey] = []
        self.failed = ""
        self.transactions = 0
        self._busy = False
        self._last_end = 0.0
        self._timer: Timer | None = None
        self._snapshot_timer: Timer | None = None
        self._waiting: list[Callable[[], None]] = []

    def load(self) -> MetaState:
        """Read the files, waiting for the metadata thread; before the loop runs."""
        state = self._database.load()
        self.children = state.children = read_children(self._children_path, self._scheduler.now())
        newest = newest_offsets(state.group_offsets, read_offsets_snapshot(self._snapshot_path))
        self._revision = max((offset.revision for offset in newest.values()), default=0)
        self.group_offsets = {key: offset for key, offset in newest.items() if not offset.deleted}
        state.group_offsets = self.group_offsets
        self._deleted = [key for key, offset in newest.items() if offset.deleted]
        if self._deleted:
            self._snapshot_timer = self._scheduler.call_later(SNAPSHOT_SECONDS, self._snapshot)
        return state

    def commit_offset(self, key: GroupKey, offset: GroupOffset | None) -> None:
        """Remember a group's committed offset (None: forget it); stored within 50 ms."""
        self._revision += 1
        if offset is None:
            # offsets.snap may still hold it: its row says that it is gone, until a later snapshot is stored.
            self.group_offsets.pop(key, None)
            self._deleted.append(key)
            offset = GroupOffset("", 0, -1, self._revision)
        else:
            offset = msgspec.structs.replace(offset, revision=self._revision)
            self.group_offsets[key] = offset
        self.changes.group_offsets[key] = offset
        if self._snapshot_timer is None:
            self._snapshot_timer = self._scheduler.call_later(SNAPSHOT_SECONDS, self._snapshot)
        self.touch()

    def store_children(self, children: Children) -> None:
        """Replace what is known of the children; durable soon, and before stop() is over."""
        now = self._scheduler.now()

        def write() -> None:
            try:
                write_children(self._children_path, children, now)
            except OSError as error:
                log.error("children.snap cannot be written: %s", error.strerror)

        self._worker.submit(write)

    def touch(self, stored: Callable[[], None] | None = None) -> None:
        """Something changed; `stored` is called on the loop once it is durable."""
        if stored is not None:
            self._waiting.append(stored)
        if self._busy or self._timer is not None:
            return
        wait = self._last_end + BUSY_SECONDS - self._scheduler.now()
        if wait <= 0:
            self._flush()
        else:
            self._timer = self._scheduler.call_later(wait, self._flush)

    def stop(self, timeout: float) -> bool:
        """Store what is left and end the thread. True when all of it is durable."""
        if self._timer is not None:
            self._timer.cancel()
        if self._snapshot_timer is not None:
            self._snapshot_timer.cancel()
        failed: list[Exception] = []

        def attempt(step: Callable[[], None]) -> None:
            try:
                step()
            except (OSError, sqlite3.Error) as error:
                failed.append(error)
                log.error("metadata could not be stored at stop: %s", error)

        def finish() -> None:
            attempt(lambda: write_offsets_snapshot(self._snapshot_path, self.group_offsets))
            if self.changes:
                attempt(lambda: self._database.write(self.changes))
            attempt(self._database.close)

        self._worker.submit(finish)
        return self._worker.stop(timeout) and not failed

    def _flush(self) -> None:
        self._timer = None
        if not self.changes:
            self._tell(self._take_waiting())
            return
        changes, self.changes, waiting = self.changes, MetaChanges(), self._take_waiting()
        self._busy = True

        def write() -> None:
            error = ""
            try:
                self._database.write(changes)
            except Exception as caught:  # whatever it is, the next attempt must not wait for ever
                error = str(caught) or repr(caught)
            self._scheduler.call_soon_threadsafe(lambda: self._written(changes, waiting, error))

        self._worker.submit(write)

    def _written(self, changes: MetaChanges, waiting: list[Callable[[], None]], error: str) -> None:
        self._busy = False
        self._last_end = self._scheduler.now()
        if error:
            if error != self.failed:
                log.error(
                    "meta.db cannot be written (%s); trying again every second, offsets.snap is still written", error
                )
            self.failed = error
            changes.absorb(self.changes)
            self.changes = changes
            self._waiting = waiting + self._waiting
            self._timer = self._scheduler.call_later(RETRY_SECONDS, self._flush)
            return
        if self.failed:
            log.warning("meta.db can be written again")
            self.failed = ""
        self.transactions += 1
        self._tell(waiting)
        if self.changes or self._waiting:
            self.touch()

    def _snapshot(self) -> None:
        self._snapshot_timer = None
        offsets = dict(self.group_offsets)
        deleted, self._deleted = self._deleted, []

        def write() -> None:
            try:
                write_offsets_snapshot(self._snapshot_path, offsets)
            except OSError as error:
                log.error("offsets.snap cannot be written: %s", error.strerror)
                self._scheduler.call_soon_threadsafe(lambda: self._deleted.extend(deleted))
            else:
                self._scheduler.call_soon_threadsafe(lambda: self._forget(deleted))

        self._worker.submit(write)

    def _forget(self, deleted: list[GroupKey]) -> None:
        """Nothing needs these committed offsets any more: their rows may go."""
        for key in deleted:
            if key not in self.group_offsets:
                self.changes.group_offsets[key] = None
        if deleted:
            self.touch()

    def _take_waiting(self) -> list[Callable[[], None]]:
        waiting, self._waiting = self._waiting, []
        return waiting

    @staticmethod
    def _tell(waiting: list[Callable[[], None]]) -> None:
        for callback in waiting:
            callback()
