"""What an operator does to a group: reset its offsets (or see what that would do), refresh it, delete it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from edgebroker.broker.core import Core
from edgebroker.broker.delivery.state import Group
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.gather import gather
from edgebroker.storage.engine import Log
from edgebroker.storage.types import Change, begin_history


class MoveRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/groups/NAME/offsets. `to`: earliest, latest, an offset, or @TIME in ms since 1970; or
    `shift` by so many records, within the log. Without a partition all of the topic's."""

    topic: str
    partition: int = -1
    to: str = ""
    shift: int = 0
    dry_run: bool = False


class RefreshRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/groups/NAME/refresh."""

    topic: str
    partition: int = -1


class Move(NamedTuple):
    """Where a group stands in a partition (-1: nowhere yet), and where it goes."""

    log: Log
    before: int
    after: int


class RefusedError(Exception):
    """What the operator asked for cannot be done: the outcome, and the message that says why."""

    def __init__(self, outcome: Outcome, message: str) -> None:
        super().__init__(message)
        self.outcome = outcome


Moved = Callable[[list[Move], Outcome, str], None]


class GroupOperations:
    """Owned by the loop thread."""

    def __init__(self, core: Core) -> None:
        self._engine, self._groups, self._leases, self._refreshes = (
            core.engine,
            core.groups,
            core.leases,
            core.refreshes,
        )

    def move(self, group: Group, request: MoveRequest, done: Moved) -> None:
        """Reset (or with dry_run only tell) a group's committed offsets, also while members read: their leases end, and
        they continue from the new offsets. done(moves, outcome, why), once stored."""
        try:
            logs = self._partitions(request.topic, request.partition)
            if bool(request.to) == bool(request.shift):
                why = "give either to (earliest, latest, an offset, @TIME) or shift (a number of records)"
                raise RefusedError(Outcome.INVALID, why)
            for log in logs:
                _check_not_refreshing(group, log)
            if request.to.startswith("@"):
                self._by_time(group, logs, request, done)
                return
            found = {log: self._target(group, log, request) for log in logs}
        except RefusedError as error:
            done([], error.outcome, str(error))
            return
        self._apply(group, found, request.dry_run, done)

    def refresh(self, group: Group, request: RefreshRequest, done: Done) -> None:
        """Begin a snapshot refresh of a topic (or one partition) by a group; done once it is stored."""
        try:
            logs = self._partitions(request.topic, request.partition)
        except RefusedError as error:
            done(error.outcome, str(error))
            return
        one = gather(len(logs), done)
        for log in logs:
            self._refreshes.begin(group, log, one)

    def accept_loss(self, topic: str, lost: list[Log], accepted: Callable[[Log], None], done: Done) -> None:
        """Continue from the ends there are, in a new epoch: replicas with more records detect it, and truncate."""

        def change(log: Log) -> Change:
            return lambda old: replace(begin_history(old, log.durable_end), restored=False)

        def changed(outcome: Outcome, message: str) -> None:
            if outcome is Outcome.OK:
                for log in lost:
                    accepted(log)
            done(outcome, message)

        keep: Change = lambda old: old  # noqa: E731
        changes = [change(log) if log in lost else keep for log in self._engine.partitions(topic)]
        self._engine.change_identities(topic, changes, changed)

    def delete(self, group: Group) -> str:
        """Forget a group; why not, when it has members."""
        if group.members:
            return f"group {group.name} has {len(group.members)} members; stop them first"
        self._groups.forget(group)
        return ""

    def _partitions(self, topic: str, partition: int) -> list[Log]:
        logs = self._engine.partitions(topic)
        if not logs:
            raise RefusedError(Outcome.NOT_FOUND, f"there is no topic {topic} on this node")
        if partition >= len(logs) or partition < -1:
            raise RefusedError(Outcome.NOT_FOUND, f"{topic} has partitions 0 to {len(logs) - 1}, not {partition}")
        return logs if partition == -1 else [logs[partition]]

    @staticmethod
    def _target(group: Group, log: Log, request: MoveRequest) -> int:
        if request.shift:
            committed = group.committed(log)
            wanted = (committed.next_offset if committed is not None else 0) + request.shift
            return min(log.durable_end, max(log.log_start, wanted))
        if request.to in ("earliest", "latest"):
            return log.log_start if request.to == "earliest" else log.durable_end
        if not _is_number(request.to):
            why = f"to: earliest, latest, an offset, or @TIME in ms since 1970, not {request.to!r}"
            raise RefusedError(Outcome.INVALID, why)
        offset = int(request.to)
        if not log.log_start <= offset <= log.durable_end:
            why = f"{log.name} has offsets {log.log_start} to {log.durable_end}, not {offset}"
            raise RefusedError(Outcome.INVALID, why)
        return offset

    def _by_time(self, group: Group, logs: list[Log], request: MoveRequest, done: Moved) -> None:
        if not _is_number(request.to[1:]):
            why = f"to: @TIME is a number of milliseconds since 1970, not {request.to!r}"
            raise RefusedError(Outcome.INVALID, why)
        found: dict[Log, int] = {}

        def looked_up(outcome: Outcome, why: str) -> None:
            if outcome is Outcome.OK:
                self._apply(group, found, request.dry_run, done)
            else:
                done([], outcome, why)

        def note(log: Log, offset: int, error: str) -> None:
            found[log] = offset
            one(Outcome.STORAGE_TIMEOUT if error else Outcome.OK, f"{log.name}: {error}" if error else "")

        one = gather(len(logs), looked_up)
        for log in logs:
            self._engine.offset_at_time(log, int(request.to[1:]), partial(note, log))

    def _apply(self, group: Group, found: dict[Log, int], dry_run: bool, done: Moved) -> None:
        try:
            for log in found:
                _check_not_refreshing(group, log)  # it may have begun while a time was looked up
        except RefusedError as error:
            done([], error.outcome, str(error))
            return
        moves = []
        if not dry_run:
            group = self._groups.adopt(group)
        for log, offset in found.items():
            committed = group.committed(log)
            moves.append(Move(log, committed.next_offset if committed is not None else -1, offset))
            if dry_run:
                continue
            key = (log.topic, log.partition)
            for known in (group.pauses, group.reasons, group.rejected):
                known.pop(key, None)
            group.last_clients[key] = ""  # no client resumes behind what it acknowledged before
            self._groups.move(group, log, offset)
            holder = group.holders.get(key)
            if holder is not None:
                self._leases.move(holder, offset)
        if dry_run:
            done(moves, Outcome.OK, "")
        else:
            self._engine.when_stored(lambda: done(moves, Outcome.OK, ""))


def _check_not_refreshing(group: Group, log: Log) -> None:
    committed = group.committed(log)
    if committed is not None and committed.refreshing:
        why = f"{log.name} is being refreshed by this group; its offset moves with that"
        raise RefusedError(Outcome.CONFLICT, why)


def _is_number(text: str) -> bool:
    """True for what fits the 64 bits of offsets and times."""
    return text.isascii() and text.isdigit() and len(text) <= 18
