"""Deleting a topic, and remembering that it was deleted: only its origin decides that, and everybody below follows.

    tombstones written -> the topic is gone for everybody -> what is being stored ends
    -> its directory moves to deleted/ -> its rows go -> its files are removed, by a thread of their own

A tombstone names a log and the last history of it that is deleted. Once it is durable the topic is deleted, whenever
the power goes: the next start does the rest. Tombstones are kept, for a child may come back after months.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from edgebroker.common.errors import Code, DamagedDataError
from edgebroker.common.scheduler import Scheduler
from edgebroker.common.threads import start_thread
from edgebroker.storage import files
from edgebroker.storage.checked import read_if_whole, write_checked
from edgebroker.storage.committer import Committer
from edgebroker.storage.engine import Done, Tombstone
from edgebroker.storage.identity import read_identity
from edgebroker.storage.log import PartitionLog
from edgebroker.storage.metadata import Metadata

log = logging.getLogger(__name__)

FILE_NAME, DIRECTORY = "tombstones", "deleted"
MAX_TOMBSTONES = 100_000
WAIT_SECONDS = 0.05


class Removal:
    """Owned by the loop thread. `topics` are the store's; `busy` are the names of those that are being removed."""

    def __init__(
        self,
        path: Path,
        topics: dict[str, list[PartitionLog]],
        scheduler: Scheduler,
        committer: Committer,
        metadata: Metadata,
        tombstones: dict[str, Tombstone],
    ) -> None:
        self._path, self._topics, self._scheduler = path, topics, scheduler
        self._committer, self._metadata = committer, metadata
        self.tombstones = tombstones
        self.busy: set[str] = set()

    def delete(self, name: str, gone: Callable[[list[PartitionLog]], None], done: Done) -> None:
        """Delete a topic with all its logs. `gone` is called when it is decided, durably, and nobody finds the topic
        any more; `done` when its place is free for another one of that name."""
        logs = self._topics.get(name)
        if logs is None:
            done(Code.UNKNOWN_TOPIC, f"there is no topic {name} on this node")
            return
        if name in self.busy:
            done(Code.OVERLOADED, f"topic {name} is being deleted")
            return
        self.busy.add(name)
        tombstones = dict(self.tombstones)
        for partition in logs:
            identity = partition.identity
            tombstones.pop(identity.log_id, None)
            tombstones[identity.log_id] = Tombstone(name, identity.epoch)
        for old in list(tombstones)[: max(0, len(tombstones) - MAX_TOMBSTONES)]:
            del tombstones[old]

        def decided(result: object) -> None:
            if result is not None:
                self.busy.discard(name)
                done(Code.READ_ONLY, f"the tombstone of {name} cannot be stored: {result}")
                return
            self.tombstones.update(tombstones)
            del self._topics[name]
            log.warning("topic %s is deleted", name)
            gone(logs)
            self._when_quiet(name, logs, done)

        self._committer.call(lambda: write_tombstones(self._path, tombstones), decided)

    def _when_quiet(self, name: str, logs: list[PartitionLog], done: Done) -> None:
        """What was staged before is stored, as its producers were promised; then nobody touches the files any more."""
        if any(one.staged_end != one.durable_end or one.rolling or one.rewriting for one in logs):
            self._scheduler.call_later(WAIT_SECONDS, lambda: self._when_quiet(name, logs, done))
            return
        for partition in logs:
            partition.rewriting = partition.rolling = True

        def moved(result: object) -> None:
            self.busy.discard(name)
            for partition in logs:
                for segment in partition.segments:
                    segment.retire()
            self._metadata.changes.drop_topic(name)
            if isinstance(result, Exception):
                done(Code.READ_ONLY, f"{name} is deleted, but its files are still there until the next start: {result}")
                return
            empty(self._path)
            self._metadata.touch(lambda: done(Code.OK, ""))

        self._committer.call(lambda: set_aside(self._path, name), moved)


def write_tombstones(path: Path, tombstones: dict[str, Tombstone]) -> None:
    """Durable when this returns. Raises OSError; on a full disk the reserve is spent for it."""
    try:
        write_checked(path / FILE_NAME, tombstones)
    except OSError as error:
        if error.errno not in files.FULL or not (path / "reserve").exists():
            raise
        files.remove(path / "reserve")
        write_checked(path / FILE_NAME, tombstones)


def read_tombstones(path: Path) -> dict[str, Tombstone]:
    """By log id; none when the file is missing or damaged (which is logged: deleted topics may come back then)."""
    return read_if_whole(path / FILE_NAME, dict[str, Tombstone], {})


def finish_removals(path: Path, tombstones: dict[str, Tombstone]) -> list[str]:
    """What a crash left of topics that are deleted: before any topic is opened. Their names."""
    finished = []
    for name in {tombstone.topic for tombstone in tombstones.values()}:
        for directory in (path / "topics" / name).glob("[0-9]*"):
            try:
                identity = read_identity(directory)
            except (OSError, DamagedDataError):
                continue
            tombstone = tombstones.get(identity.log_id)
            if tombstone is not None and identity.epoch <= tombstone.epoch:
                set_aside(path, name)
                finished.append(name)
                break
    empty(path)
    return finished


def set_aside(path: Path, name: str) -> None:
    """Move a topic's directory where nobody looks for it; durable when this returns. Raises OSError."""
    aside = path / DIRECTORY
    files.make_directory(aside)
    number = max((int(one.name) for one in aside.iterdir() if one.name.isdigit()), default=0) + 1
    files.move(path / "topics" / name, aside / str(number))
    files.sync_directory(path / "topics")


def empty(path: Path) -> None:
    """Remove what was set aside; the files may be many and large."""
    if (path / DIRECTORY).exists():
        start_thread("edgebroker-removal", lambda: shutil.rmtree(path / DIRECTORY, ignore_errors=True))
