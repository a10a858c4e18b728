"""Deleting a topic, and remembering that it was deleted: only its origin decides that, and every replica follows.

    tombstones written -> the topic is gone for clients -> what is being stored ends
    -> its directory moves to deleted/ -> its rows go -> its files are removed, by a thread of their own

A tombstone names a log and the last history of it that is deleted. Once it is durable the topic is deleted, whenever
the power goes: the next start does the rest. Tombstones are kept, for a child may come back after months.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path

from edgebroker.common.errors import DamagedDataError
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.runtime.threads import start_thread
from edgebroker.storage import files
from edgebroker.storage.checksummed import read_if_whole, write_checked
from edgebroker.storage.commit.committer import Committer
from edgebroker.storage.identity import read_identity
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.metadata.metadata import Metadata
from edgebroker.storage.types import Tombstone

log = logging.getLogger(__name__)

FILE_NAME, DIRECTORY = "tombstones", "deleted"
MAX_TOMBSTONES = 100_000
WAIT_SECONDS, RETRY_SECONDS = 0.05, 10.0


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
        # What the file holds; owned by the commit thread.
        self._stored = dict(tombstones)
        self.busy: set[str] = set()

    def delete(
        self, name: str, gone: Callable[[list[PartitionLog]], None], done: Done, epochs: Mapping[str, int] | None = None
    ) -> None:
        """Delete a topic with all its logs. `gone` is called when it is decided, durably, and the topic is not
        found any more; `done` when its name is free again. `epochs`: the last histories that the
        origin deleted, by log id; without them those that there are."""
        logs = self._topics.get(name)
        if logs is None:
            done(Outcome.NOT_FOUND, f"there is no topic {name} on this node")
            return
        if name in self.busy:
            done(Outcome.OVERLOADED, f"topic {name} is being deleted")
            return
        self.busy.add(name)
        fresh = {
            one.identity.log_id: Tombstone(name, (epochs or {}).get(one.identity.log_id, one.identity.epoch))
            for one in logs
        }

        def work() -> None:
            kept = [(log_id, one) for log_id, one in self._stored.items() if log_id not in fresh]
            stored = dict([*kept[max(0, len(kept) + len(fresh) - MAX_TOMBSTONES) :], *fresh.items()])
            write_tombstones(self._path, stored)
            self._stored = stored

        def decided(result: object) -> None:
            if result is not None:
                self.busy.discard(name)
                done(Outcome.READ_ONLY, f"the tombstone of {name} cannot be stored: {result}")
                return
            self.tombstones.update(fresh)
            del self._topics[name]
            log.warning("topic %s is deleted", name)
            gone(logs)
            self._when_quiet(name, logs, done)

        self._committer.call(work, decided)

    def _when_quiet(self, name: str, logs: list[PartitionLog], done: Done) -> None:
        """What was staged before is stored, as its producers were promised; then the files are not touched any more."""
        if not all(one.quiet for one in logs):
            self._scheduler.call_later(WAIT_SECONDS, lambda: self._when_quiet(name, logs, done))
            return
        for partition in logs:
            partition.rewriting = partition.rolling = True
            for segment in partition.segments:
                segment.retire()
        self._metadata.changes.drop_topic(name)
        self._metadata.touch(lambda: self._move_away(name, done))

    def _move_away(self, name: str, done: Done) -> None:
        """Until it is done the name is taken: another topic must not be made over these files."""

        def moved(result: object) -> None:
            if isinstance(result, Exception):
                log.error("topic %s is deleted, but its files cannot be moved away: %s; trying again", name, result)
                done(Outcome.READ_ONLY, f"{name} is deleted, but its files are still there: {result}")
                again = lambda: self._move_away(name, lambda code, message: None)  # noqa: E731
                self._scheduler.call_later(RETRY_SECONDS, again)
                return
            self.busy.discard(name)
            empty(self._path)
            done(Outcome.OK, "")

        self._committer.call(lambda: move_away(self._path, name), moved)

    def left_over(self, name: str) -> None:
        """A topic that is deleted and could not be moved away at the start."""
        self.busy.add(name)
        self._scheduler.call_later(RETRY_SECONDS, lambda: self._move_away(name, lambda code, message: None))


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


def finish_removals(path: Path, tombstones: dict[str, Tombstone]) -> tuple[list[str], list[str]]:
    """What a crash left of topics that are deleted, before any topic is opened: the names of all of these, and of those
    that cannot be moved away."""
    finished: list[str] = []
    left: list[str] = []
    for name in {tombstone.topic for tombstone in tombstones.values()}:
        for directory in (path / "topics" / name).glob("[0-9]*"):
            try:
                identity = read_identity(directory)
            except (OSError, DamagedDataError):
                continue
            tombstone = tombstones.get(identity.log_id)
            if tombstone is not None and identity.epoch <= tombstone.epoch:
                finished.append(name)
                try:
                    move_away(path, name)
                except OSError as error:
                    log.error("topic %s is deleted, but its files cannot be moved away: %s", name, error)
                    left.append(name)
                break
    empty(path)
    return finished, left


def move_away(path: Path, name: str) -> None:
    """Move a topic's directory to where no start looks for topics; durable when this returns. Raises OSError."""
    target = path / DIRECTORY
    files.make_directory(target)
    number = max((int(one.name) for one in target.iterdir() if one.name.isdigit()), default=0) + 1
    files.move(path / "topics" / name, target / str(number))
    files.sync_directory(path / "topics")


def empty(path: Path) -> None:
    """Remove what was moved away; the files may be many and large."""
    gone = list((path / DIRECTORY).iterdir()) if (path / DIRECTORY).exists() else []

    def remove() -> None:
        for directory in gone:
            files.remove_tree(directory)

    if gone:
        start_thread("edgebroker-removal", remove)
