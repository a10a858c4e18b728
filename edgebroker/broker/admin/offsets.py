"""What an operator does to a group: look where it would go, move its places, refresh it, delete it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import msgspec

from edgebroker.broker.delivery.groups import Group, Groups
from edgebroker.broker.delivery.leases import Leases
from edgebroker.broker.delivery.refresh import Refreshes
from edgebroker.common.errors import Code
from edgebroker.storage.engine import Engine, Log
from edgebroker.storage.identity import Identity, begin_history


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
    """What the operator asked for cannot be done; the message says why."""


class GroupOperations:
    """Owned by the loop thread."""

    def __init__(self, engine: Engine, groups: Groups, leases: Leases, refreshing: Refreshes) -> None:
        self._engine, self._groups, self._leases, self._refreshes = engine, groups, leases, refreshing

    def move(self, group: Group, request: MoveRequest, done: Callable[[list[Move], str], None]) -> None:
        """Move (or with dry_run only tell) a group's places, also while members read: their leases end, they go on
        from the new places. done(moves, error), once stored."""
        try:
            logs = self._partitions(request.topic, request.partition)
            if bool(request.to) == bool(request.shift):
                raise RefusedError("give either to (earliest, latest, an offset, @TIME) or shift (a number of records)")
            for log in logs:
                committed = group.committed(log)
                if committed is not None and committed.refreshing:
                    raise RefusedError(f"{log.name} is being refreshed by this group; its place moves with that")
            found: dict[Log, int] = {}
            if request.to.startswith("@"):
                self._by_time(group, logs, request, done)
                return
            for log in logs:
                found[log] = self._target(group, log, request)
        except RefusedError as error:
            done([], str(error))
            return
        self._apply(group, found, request.dry_run, done)

    def refresh(self, group: Group, request: RefreshRequest, done: Callable[[Code, str], None]) -> None:
        """Begin a refresh of a topic (or one partition) by a group; done once it is stored."""
        try:
            logs = self._partitions(request.topic, request.partition)
        except RefusedError as error:
            done(Code.UNKNOWN_TOPIC, str(error))
            return
        answers: list[tuple[Code, str]] = []

        def one(code: Code, message: str) -> None:
            answers.append((code, message))
            if len(answers) == len(logs):
                done(*next((answer for answer in answers if answer[0] is not Code.OK), answers[0]))

        for log in logs:
            self._refreshes.begin(group, log, one)

    def accept_loss(
        self, topic: str, lost: list[Log], accepted: Callable[[Log], None], done: Callable[[Code, str], None]
    ) -> None:
        """Go on from the ends there are, in a new history: who has more of the old one finds out, and cuts it off."""

        def change(log: Log) -> Callable[[Identity], Identity]:
            return lambda old: begin_history(old, log.durable_end)

        def changed(code: Code, message: str) -> None:
            if code is Code.OK:
                for log in lost:
                    accepted(log)
            done(code, message)

        keep: Callable[[Identity], Identity] = lambda old: old  # noqa: E731
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
            raise RefusedError(f"there is no topic {topic} on this node")
        if partition >= len(logs) or partition < -1:
            raise RefusedError(f"{topic} has partitions 0 to {len(logs) - 1}, not {partition}")
        return logs if partition == -1 else [logs[partition]]

    @staticmethod
    def _target(group: Group, log: Log, request: MoveRequest) -> int:
        if request.shift:
            committed = group.committed(log)
            return min(log.durable_end, max(log.log_start, (committed.next_offset if committed else 0) + request.shift))
        if request.to in ("earliest", "latest"):
            return log.log_start if request.to == "earliest" else log.durable_end
        if not _is_number(request.to):
            raise RefusedError(f"to: earliest, latest, an offset, or @TIME in ms since 1970, not {request.to!r}")
        offset = int(request.to)
        if not log.log_start <= offset <= log.durable_end:
            raise RefusedError(f"{log.name} has offsets {log.log_start} to {log.durable_end}, not {offset}")
        return offset

    def _by_time(
        self, group: Group, logs: list[Log], request: MoveRequest, done: Callable[[list[Move], str], None]
    ) -> None:
        if not _is_number(request.to[1:]):
            raise RefusedError(f"to: @TIME is a number of milliseconds since 1970, not {request.to!r}")
        found: dict[Log, int] = {}
        errors: list[str] = []

        def one(log: Log, offset: int, error: str) -> None:
            found[log] = offset
            if error:
                errors.append(f"{log.name}: {error}")
            if len(found) < len(logs):
                return
            if errors:
                done([], errors[0])
            else:
                self._apply(group, found, request.dry_run, done)

        for log in logs:
            self._engine.offset_at_time(
                log,
                int(request.to[1:]),
                lambda offset, error, log=log: one(log, offset, error),  # type: ignore[misc]
            )

    def _apply(
        self, group: Group, found: dict[Log, int], dry_run: bool, done: Callable[[list[Move], str], None]
    ) -> None:
        for log in found:
            committed = group.committed(log)
            if committed is not None and committed.refreshing:  # it may have begun while a time was looked up
                done([], f"{log.name} is being refreshed by this group; its place moves with that")
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
            group.pauses.pop(key, None)
            group.reasons.pop(key, None)
            group.last_clients[key] = ""  # no client resumes behind what it acknowledged before
            self._groups.move(group, log, offset)
            holder = group.holders.get(key)
            if holder is not None:
                self._leases.move(holder, offset)
        if dry_run:
            done(moves, "")
        else:
            self._engine.when_stored(lambda: done(moves, ""))


def _is_number(text: str) -> bool:
    """True for what fits the 64 bits of offsets and times."""
    return text.isascii() and text.isdigit() and len(text) <= 18
