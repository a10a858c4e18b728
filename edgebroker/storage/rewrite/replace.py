"""Replacing the logs of a topic by a copy that was loaded beside them, in one step.

    rows of the old files go -> directories exchanged -> reopened -> readers continue in the new files

The copy is the directory of a topic in another store on the same file system. Which resyncs are under way is noted
in the file `resets`, so that a start finishes what a crash interrupted: between two renames the topic has no directory.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from msgspec.structs import replace

from edgebroker.common.errors import DamagedDataError, EdgeBrokerError
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.runtime.threads import start_thread
from edgebroker.storage import files
from edgebroker.storage.checksummed import read_if_whole, write_checked
from edgebroker.storage.commit.committer import Committer
from edgebroker.storage.engine import EngineListener, MirrorEngine
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.reader import ColdReader, SegmentRead
from edgebroker.storage.log.recovery import RecoveredLog
from edgebroker.storage.metadata.metadata import Metadata
from edgebroker.storage.opening import Opener
from edgebroker.storage.types import Identity, ResyncRow
from edgebroker.storage.upkeep.checkpoints import Checkpoints
from edgebroker.storage.upkeep.scrub import Scrub

log = logging.getLogger(__name__)

FILE_NAME, STAGING, OLD, GONE = "resets", "staging", "old", ".gone"


class TopicReplacement:
    """Owned by the loop thread. `topics` are the store's, `rows` the resyncs that were stored last."""

    def __init__(
        self,
        path: Path,
        topics: dict[str, list[PartitionLog]],
        opener: Opener,
        committer: Committer,
        metadata: Metadata,
        reader: ColdReader,
        checkpoints: Checkpoints,
        scrub: Scrub,
        listener: EngineListener,
        rows: list[ResyncRow],
        scheduler: Scheduler,
        copy_of: Callable[[Path], MirrorEngine],
    ) -> None:
        self._path, self.rows = path, rows
        self._scheduler, self._copy_of = scheduler, copy_of
        self._topics, self._opener, self._committer = topics, opener, committer
        self._metadata, self._reader = metadata, reader
        self._checkpoints, self._scrub, self._listener = checkpoints, scrub, listener

    def staging(self, resync_id: str) -> Path:
        return staging_of(self._path, resync_id)

    def drop_staging(self, keep: Callable[[str], bool]) -> None:
        drop_staging(self._path, keep)

    def open_copy(self, resync_id: str, done: Callable[[MirrorEngine | None, str], None]) -> None:
        directory = self.staging(resync_id)

        def work() -> None:
            try:
                store = self._copy_of(directory)
            except (OSError, EdgeBrokerError) as error:
                why = files.reason(error)
                self._scheduler.call_soon_threadsafe(lambda: done(None, why))
            else:
                self._scheduler.call_soon_threadsafe(lambda: done(store, ""))

        start_thread("edgebroker-copy", work)

    def quiet(self, name: str) -> bool:
        """Is everything of a topic stored, and nothing of it being rewritten?"""
        return all(one.quiet for one in self._topics.get(name, []))

    def remember(self, rows: list[ResyncRow], done: Callable[[str], None]) -> None:
        """Store which resyncs there are: done("") once that is durable, done(why) when it is not."""
        self.rows = rows
        self._committer.call(
            lambda: write_resyncs(self._path, rows), lambda result: done("" if result is None else files.reason(result))
        )

    def replace(self, name: str, staged: Path, done: Done) -> None:
        """Take the copy at `staged`; nothing may be staged in the logs of the topic, and nothing writes to the copy.
        The old directory is beside it, as OLD, when done is called."""
        logs = self._topics[name]
        if not self.quiet(name):
            done(Outcome.OVERLOADED, f"{name}: something else is being stored; try again in a moment")
            return
        for partition in logs:
            partition.rewriting = partition.rolling = partition.replacing = True
        live = logs[0].directory.parent

        def work() -> list[tuple[Identity, RecoveredLog]]:
            exchange(live, staged)
            try:
                return [self._opener.reopen(name, one.partition, one.directory) for one in logs]
            except (OSError, DamagedDataError):
                exchange_back(live, staged)
                raise

        def finished(result: object) -> None:
            for partition in logs:
                partition.rewriting = partition.rolling = partition.replacing = False
            if not isinstance(result, list):
                for partition in logs:
                    self._checkpoints.checkpoint(partition)
                done(*files.refusal(f"{name} cannot be replaced by the fresh copy", result))
                return
            for partition, (identity, recovered) in zip(logs, result, strict=True):
                self._take(partition, identity, recovered)
            done(Outcome.OK, "")
            self._listener.on_topic(name)

        def stored() -> None:
            # After every read that knows the old files by their names.
            self._reader.submit(SegmentRead, lambda result: self._committer.call(work, finished))

        # What was noted about the old files would certify bytes of the new ones.
        self._metadata.changes.drop_topic(name)
        self._metadata.touch(stored)

    def _take(self, partition: PartitionLog, identity: Identity, recovered: RecoveredLog) -> None:
        for segment in partition.rewritten(identity, recovered, whole=True):
            segment.retire()
        self._checkpoints.corrupt_ranges_changed(partition)
        self._checkpoints.checkpoint(partition)
        self._scrub.verify_log(partition)
        self._listener.on_rewritten(partition)


def exchange(live: Path, staged: Path) -> None:
    """Each step is durable before the next; a failure undoes what was done. Raises OSError."""
    old = staged.parent.parent / OLD
    files.move(live, old)
    files.sync_directory(live.parent)
    try:
        files.move(staged, live)
        files.sync_directory(staged.parent)
    except OSError:
        files.move(old, live)
        raise


def exchange_back(live: Path, staged: Path) -> None:
    """Undo an exchange. Raises OSError."""
    files.move(live, staged)
    files.move(staged.parent.parent / OLD, live)


def finish_replacements(path: Path, rows: Sequence[ResyncRow]) -> tuple[list[str], list[ResyncRow]]:
    """What a crash left of replacements, before any topic is opened: the topics whose files may be new ones, and the
    rows as they are then. Where the disk does not let it be finished the old files are served, and the copy is tried
    again."""
    finished: list[str] = []
    now: list[ResyncRow] = []
    for row in rows:
        if row.phase != "switching":
            now.append(row)
            continue
        staged, live = staging_of(path, row.id) / "topics" / row.topic, path / "topics" / row.topic
        old = staging_of(path, row.id) / OLD
        try:
            if staged.exists() and live.exists():
                exchange(live, staged)
            elif staged.exists():
                files.move(staged, live)
                files.sync_directory(staged.parent)
            now.append(replace(row, phase="done"))
        except OSError as error:
            log.error("%s cannot be replaced by the fresh copy: %s", row.topic, error)
            if old.exists() and not live.exists():
                old.rename(live)
            now.append(replace(row, phase="loading"))
        finished.append(row.topic)
    return finished, now


def read_resyncs(path: Path) -> list[ResyncRow]:
    """None when the file is missing or damaged (which is logged): then a resync has to be requested again."""
    return read_if_whole(path / FILE_NAME, list[ResyncRow], [])


def write_resyncs(path: Path, rows: Sequence[ResyncRow]) -> None:
    """Durable when this returns. Raises OSError."""
    write_checked(path / FILE_NAME, rows)


def staging_of(path: Path, resync_id: str) -> Path:
    """Where the copy of a resync is made."""
    return path / STAGING / resync_id


def drop_staging(path: Path, keep: Callable[[str], bool]) -> None:
    """Remove what resyncs that are over have left, on a thread of its own: it may be much."""
    if not (path / STAGING).exists():
        return
    gone: list[Path] = []
    for directory in (path / STAGING).iterdir():
        if keep(directory.name):
            continue
        if directory.suffix != GONE:  # it may be made again meanwhile, and must not find the old one
            directory = directory.rename(directory.with_name(f"{directory.name}-{os.urandom(4).hex()}{GONE}"))
        gone.append(directory)

    def remove() -> None:
        for directory in gone:
            files.remove_tree(directory)

    if gone:
        start_thread("edgebroker-removal", remove)
