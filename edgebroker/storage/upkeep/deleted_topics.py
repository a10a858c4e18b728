"""The files of deleted topics: they stay for a while, and can be taken back until then.

    deleted/NUMBER-TOPIC   what the directory of the topic was; its time of change is when it was deleted

They go after `deleted_retention_ms`, and before anything else when the disk wants bytes back. A topic that is taken
back continues in a new history, for every node below was told that the ones before are deleted. Under another name it
is another log with the same records.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from msgspec.structs import replace

from edgebroker.common.errors import DamagedDataError
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.clock import is_plausible
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.runtime.threads import start_thread
from edgebroker.storage import files
from edgebroker.storage.commit.committer import Committer
from edgebroker.storage.identity import change_identity, read_identity
from edgebroker.storage.log.partition import PartitionLog
from edgebroker.storage.log.recovery import RecoveredLog
from edgebroker.storage.opening import Opener
from edgebroker.storage.types import DeletedTopic, Identity, begin_history, make_identity

log = logging.getLogger(__name__)

DIRECTORY = "deleted"


class _Kept(NamedTuple):
    path: Path
    topic: DeletedTopic


class DeletedTopics:
    """Owned by the loop thread. `free` says why a name cannot be given to a topic now; `opened` takes over the logs of
    one that was taken back."""

    def __init__(
        self,
        path: Path,
        node_uid: str,
        opener: Opener,
        scheduler: Scheduler,
        committer: Committer,
        opened: Callable[[str, list[PartitionLog]], None],
    ) -> None:
        self._path, self._node_uid, self._opener = path, node_uid, opener
        self._scheduler, self._committer, self._opened = scheduler, committer, opened
        self._kept = [found for found in map(_read, sorted(_directories(path))) if found is not None]
        self._busy: set[Path] = set()
        self._removing = 0

    @property
    def topics(self) -> list[DeletedTopic]:
        """What can be taken back, the oldest first."""
        return [one.topic for one in self._kept]

    @property
    def size_bytes(self) -> int:
        return sum(one.topic.bytes for one in self._kept)

    def added(self, directory: Path) -> None:
        """A topic was moved away."""
        found = _read(directory)
        if found is not None:
            self._kept.append(found)

    # ---- removing ----

    def remove(self, now_ms: int, keep_ms: int, wanted: int) -> int:
        """Remove what was kept long enough (`now_ms` 0: the clock is not to be believed), and the oldest ones while
        the disk wants bytes back: how many it still wants then, 0 while files are being removed."""
        for one in list(self._kept):
            age = now_ms - one.topic.deleted_ms
            if now_ms and not is_plausible(one.topic.deleted_ms, now_ms):
                self._kept[self._kept.index(one)] = _stamp(one, now_ms)
                continue
            if one.path in self._busy or not (wanted > 0 or keep_ms == 0 or (now_ms and age >= keep_ms)):
                continue
            wanted -= one.topic.bytes
            self._kept.remove(one)
            self._removing += 1
            log.info("the files of deleted topic %s are removed", one.topic.topic)
            start_thread("edgebroker-removal", partial(self._remove, one.path))
        return 0 if self._removing else wanted

    def _remove(self, path: Path) -> None:
        files.remove_tree(path)
        self._scheduler.call_soon_threadsafe(self._removed)

    def _removed(self) -> None:
        self._removing -= 1

    # ---- taking back ----

    def undelete(self, topic: str, name: str, done: Done) -> None:
        """Take back the last topic that was called `topic`, as `name`. NOT_FOUND: its files are gone; READ_ONLY. Its
        logs are read from end to end first, on a thread of their own."""
        kept = [one for one in self._kept if one.topic.topic == topic and one.path not in self._busy]
        found = kept[-1] if kept else None
        if found is None:
            done(Outcome.NOT_FOUND, f"there are no files of a deleted topic {topic} on this node (any more)")
            return
        self._busy.add(found.path)

        def work() -> None:
            try:
                logs: object = self._recover(found.path, topic, name)
            except (OSError, DamagedDataError) as error:
                logs = error
            self._scheduler.call_soon_threadsafe(partial(self._recovered, found, name, logs, done))

        start_thread("edgebroker-undelete", work)

    def _recover(self, directory: Path, topic: str, name: str) -> list[tuple[Identity, RecoveredLog]]:
        """Its logs with the identities that they have from now on, durably. A crash leaves them where they are."""
        logs: list[tuple[Identity, RecoveredLog]] = []
        for number in sorted(int(one.name) for one in directory.iterdir() if one.name.isdigit()):
            into = directory / str(number)
            _, recovered = self._opener.reopen(name, number, into)
            change = partial(_taken_back, self._node_uid, topic != name, recovered.next_offset)
            identity = change_identity(into, change)
            logs.append((identity, recovered._replace(epoch=identity.epoch)))
        if not logs:
            raise DamagedDataError(f"{directory}: there is no log")
        return logs

    def _recovered(self, found: _Kept, name: str, logs: object, done: Done) -> None:
        if not isinstance(logs, list):
            self._failed(found, f"{found.topic.topic} cannot be read: {files.reason(logs)}", done)
            return
        target = self._path / "topics" / name

        def move() -> None:
            if target.exists():
                raise FileExistsError(17, f"there is a directory {target}")
            files.move(found.path, target)
            files.sync_directory(found.path.parent)

        def moved(result: object) -> None:
            if result is not None:
                for _, recovered in logs:
                    for segment in recovered.segments:
                        segment.close()
                why = f"the files of {found.topic.topic} cannot be moved back: {files.reason(result)}"
                self._failed(found, why, done)
                return
            self._busy.discard(found.path)
            self._kept.remove(found)
            opened = []
            for number, (identity, recovered) in enumerate(logs):
                for segment in recovered.segments:
                    segment.path = target / str(number) / segment.path.name
                opened.append(self._opener.make_log(name, number, identity, recovered))
            log.warning("topic %s is taken back as %s", found.topic.topic, name)
            self._opened(name, opened)
            done(Outcome.OK, "")

        self._committer.call(move, moved)

    def _failed(self, found: _Kept, message: str, done: Done) -> None:
        self._busy.discard(found.path)
        log.error("%s", message)
        done(Outcome.READ_ONLY, message)


def move_away(path: Path, name: str, now_ms: int) -> Path:
    """Move a topic's directory to where no start looks for topics; durable when this returns. Where it is. Raises
    OSError."""
    into = path / DIRECTORY
    files.make_directory(into)
    number = max((int(one.name.partition("-")[0]) for one in _directories(path)), default=0) + 1
    target = into / f"{number}-{name}"
    source = path / "topics" / name
    os.utime(source, ns=(now_ms * 1_000_000, now_ms * 1_000_000))
    files.move(source, target)
    files.sync_directory(path / "topics")
    return target


def _directories(path: Path) -> list[Path]:
    into = path / DIRECTORY
    return [one for one in into.iterdir() if one.name.partition("-")[0].isdigit()] if into.exists() else []


def _read(directory: Path) -> _Kept | None:
    try:
        size = sum(one.stat().st_size for one in directory.rglob("*") if one.is_file())
        deleted_ms = directory.stat().st_mtime_ns // 1_000_000
        origin = read_identity(directory / "0").origin
    except (OSError, DamagedDataError) as error:
        log.error("%s cannot be read: %s", directory, error)
        return None
    return _Kept(directory, DeletedTopic(directory.name.partition("-")[2], origin, size, deleted_ms))


def _stamp(one: _Kept, now_ms: int) -> _Kept:
    """It was deleted under a clock that was wrong: its time begins now."""
    try:
        os.utime(one.path, ns=(now_ms * 1_000_000, now_ms * 1_000_000))
    except OSError as error:
        log.error("%s cannot be changed: %s", one.path, error)
    return one._replace(topic=replace(one.topic, deleted_ms=now_ms))


def _taken_back(node_uid: str, renamed: bool, end: int, old: Identity) -> Identity:
    identity = begin_history(old, end)
    if renamed:
        return replace(identity, origin=node_uid, begun=1, log_id=make_identity(node_uid, old.settings).log_id)
    return replace(identity, origin=node_uid, begun=old.begun if old.origin == node_uid else identity.epoch)
