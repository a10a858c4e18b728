"""Deleting a topic, and remembering that it was deleted: only its origin decides that, and every replica follows.

    tombstones written -> the topic is gone for clients -> what is being stored ends
    -> its rows go -> its directory moves to deleted/, where it stays for a while

A tombstone names a log and the histories of it that are deleted. Once it is durable the topic is deleted, whenever the
power goes: the next start does the rest. Tombstones are kept, for a child may come back after months. A topic that goes
at this node alone has none: it is gone once its directory was moved.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from edgebroker.common.errors import DamagedDataError
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.storage import files
from edgebroker.storage.checksummed import read_if_whole, write_checked
from edgebroker.storage.commit.committer import Committer
from edgebroker.storage.identity import read_identity
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.metadata.metadata import Metadata
from edgebroker.storage.types import DeletedTopic, Tombstone
from edgebroker.storage.upkeep.deleted_topics import DeletedTopics, move_away

log = logging.getLogger(__name__)

FILE_NAME = "tombstones"
MAX_TOMBSTONES = 100_000
WAIT_SECONDS, RETRY_SECONDS = 0.05, 10.0


class Removal:
    """Owned by the loop thread. `topics` are the store's; `busy` are the names of those that are being removed or taken
    back."""

    def __init__(
        self,
        path: Path,
        topics: dict[str, list[PartitionLog]],
        scheduler: Scheduler,
        clock: Clock,
        committer: Committer,
        metadata: Metadata,
        tombstones: dict[str, Tombstone],
        deleted: DeletedTopics,
    ) -> None:
        self._path, self._topics, self._scheduler, self._clock = path, topics, scheduler, clock
        self._committer, self._metadata, self._deleted = committer, metadata, deleted
        self.tombstones = tombstones
        # What the file holds; owned by the commit thread.
        self._stored = dict(tombstones)
        self.busy: set[str] = set()

    def deleted_topics(self) -> list[DeletedTopic]:
        return self._deleted.topics

    def delete(
        self,
        name: str,
        tombstones: Mapping[str, Tombstone],
        gone: Callable[[list[PartitionLog]], None],
        done: Done,
    ) -> None:
        logs = self._topics.get(name)
        if logs is None:
            done(Outcome.NOT_FOUND, f"there is no topic {name} on this node")
            return
        if name in self.busy:
            done(Outcome.OVERLOADED, f"topic {name} is being deleted")
            return
        self.busy.add(name)

        def decided(result: object) -> None:
            if result is not None:
                self.busy.discard(name)
                done(*files.refusal(f"the tombstone of {name} cannot be stored", result))
                return
            del self._topics[name]
            log.warning("topic %s is deleted%s", name, "" if tombstones else " at this node")
            gone(logs)
            self._when_quiet(name, logs, done)

        if tombstones:
            self._remember(lambda stored: {**without(stored, tombstones), **tombstones}, decided)
        else:
            decided(None)

    def lift(self, topic: str, done: Done) -> None:
        found = [log_id for log_id, tombstone in self.tombstones.items() if tombstone.topic == topic]
        if not found:
            done(Outcome.NOT_FOUND, f"no topic {topic} was deleted on this node")
            return

        def lifted(result: object) -> None:
            if result is not None:
                done(*files.refusal(f"the tombstone of {topic} cannot be lifted", result))
            else:
                log.warning("topic %s may come back: its tombstone is lifted", topic)
                done(Outcome.OK, "")

        self._remember(lambda stored: without(stored, found), lifted)

    def undelete(self, topic: str, name: str, done: Done) -> None:
        if name in self._topics:
            done(Outcome.NAME_CLASH, f"topic {name} exists; take it back under another name: --as NAME")
            return
        if name in self.busy:
            done(Outcome.OVERLOADED, f"topic {name} is being deleted or taken back; try again in a moment")
            return
        refusal = self._committer.refusal()
        # It takes no room, and on a full disk what is deleted goes first.
        if refusal is not None and refusal[0] is not Outcome.DISK_FULL:
            done(*refusal)
            return
        self.busy.add(name)

        def taken_back(outcome: Outcome, message: str) -> None:
            self.busy.discard(name)
            if outcome is Outcome.OK and topic == name and any(one.topic == name for one in self.tombstones.values()):
                self.lift(name, done)
            else:
                done(outcome, message)

        self._deleted.undelete(topic, name, taken_back)

    def _remember(
        self,
        change: Callable[[dict[str, Tombstone]], dict[str, Tombstone]],
        remembered: Callable[[object], None],
    ) -> None:
        """Change what is deleted: remembered(None) once that is durable, else remembered(why)."""

        def work() -> dict[str, Tombstone]:
            changed = change(self._stored)
            stored = dict(list(changed.items())[-MAX_TOMBSTONES:])
            write_tombstones(self._path, stored)
            self._stored = stored
            return stored

        def finished(result: object) -> None:
            if isinstance(result, dict):
                self.tombstones.clear()
                self.tombstones.update(result)
            remembered(None if isinstance(result, dict) else result)

        self._committer.call(work, finished)

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
            if not isinstance(result, Path):
                log.error("topic %s is deleted, but its files cannot be moved away: %s; trying again", name, result)
                done(*files.refusal(f"{name} is deleted, but its files are still there", result))
                again = lambda: self._move_away(name, lambda code, message: None)  # noqa: E731
                self._scheduler.call_later(RETRY_SECONDS, again)
                return
            self.busy.discard(name)
            self._deleted.added(result)
            done(Outcome.OK, "")

        self._committer.call(lambda: move_away(self._path, name, self._clock.wall_ms()), moved)

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


def without(tombstones: Mapping[str, Tombstone], log_ids: Collection[str]) -> dict[str, Tombstone]:
    """The other ones."""
    return {log_id: one for log_id, one in tombstones.items() if log_id not in log_ids}


def finish_removals(path: Path, tombstones: dict[str, Tombstone], now_ms: int) -> tuple[list[str], list[str]]:
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
            if tombstone is not None and tombstone.covers(identity.epoch):
                finished.append(name)
                try:
                    move_away(path, name, now_ms)
                except OSError as error:
                    log.error("topic %s is deleted, but its files cannot be moved away: %s", name, error)
                    left.append(name)
                break
    return finished, left
