"""Consumer groups and clients over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import msgspec

from edgebroker.broker.admin.context import AdminContext
from edgebroker.broker.admin.listing import list_in_slices
from edgebroker.broker.admin.offsets import GroupOperations, Move, MoveRequest
from edgebroker.broker.delivery.state import Cursor, Group
from edgebroker.broker.ports import Key
from edgebroker.broker.sessions.native import Session
from edgebroker.common.names import check_group_name
from edgebroker.common.outcome import Outcome
from edgebroker.network.http.router import Call
from edgebroker.storage.engine import Log
from edgebroker.storage.types import GroupOffset


class CursorStatus(msgspec.Struct, kw_only=True):
    """What is delivered to a member of a partition; `why` explains the state."""

    client_id: str
    topic: str
    partition: int
    state: str
    why: str
    isolated: bool
    revoking: bool
    next_offset: int
    acked: int
    in_flight: int
    in_flight_bytes: int
    generation: int
    lease: int
    last_ack_seconds_ago: float | None


class RefreshStatus(msgspec.Struct, rename={"from_offset": "from"}):
    """The last snapshot refresh of a partition by a group; `target` null: it is over."""

    reset_id: str
    from_offset: int
    target: int | None
    state: str


class GroupPartition(msgspec.Struct, kw_only=True):
    """A group in one partition. -1 where there is no committed offset, or no such log here; `applied` is -1 unless
    its member says what its readers see."""

    topic: str
    partition: int
    committed: int
    applied: int
    log_id: str
    durable_end: int
    lag: int
    lag_seconds: float
    attempts: int
    reason: str
    refresh: RefreshStatus | None
    standbys: int
    member: CursorStatus | None


class MemberStatus(msgspec.Struct):
    """A member, and how many partitions it holds."""

    client_id: str
    partitions: int
    unresponsive: bool


class GroupStatus(msgspec.Struct):
    """A consumer group."""

    name: str
    generation: int
    members: list[MemberStatus]
    partitions: list[GroupPartition]


Groups = list[GroupStatus]


class GroupList(msgspec.Struct):
    """All groups of the node, by name."""

    groups: list[GroupStatus]


class OffsetChange(msgspec.Struct, rename={"before": "from", "after": "to"}):
    """The committed offset of a partition before (-1: none) and after."""

    topic: str
    partition: int
    before: int
    after: int


class OffsetChanges(msgspec.Struct):
    """What resetting the offsets of a group did, or with dry_run would do."""

    group: str
    dry_run: bool
    partitions: list[OffsetChange]


class ClientStatus(msgspec.Struct, kw_only=True):
    """A connection of the binary protocol."""

    client_id: str
    address: str
    group: str
    bytes_in: int
    bytes_out: int
    backlog_bytes: int
    paused: bool
    idle_seconds: float
    waits_for: list[str]
    partitions: list[CursorStatus]


class ClientList(msgspec.Struct):
    """All of them."""

    clients: list[ClientStatus]


class GroupAdmin:
    """Owned by the loop thread."""

    def __init__(self, context: AdminContext, operations: GroupOperations) -> None:
        self._context, self._core, self._operations = context, context.core, operations

    # ---- showing ----

    def list(self, call: Call) -> None:
        groups = sorted(self._core.groups.all(), key=lambda group: group.name)
        self._show(groups, lambda found: call.answer(GroupList(found)))

    def describe(self, call: Call) -> None:
        group = self._find(call)
        if group is not None:
            self._show([group], lambda found: call.answer(found[0]))

    def clients(self, call: Call) -> None:
        sessions = list(self._context.sessions)

        def rendered() -> Iterator[object]:
            for session in sessions:
                yield self._client(session)
                yield from map(self._cursor, list(session.cursors.values()))

        list_in_slices(self._context.loop, rendered(), ClientStatus, lambda found: call.answer(ClientList(found)))

    def _find(self, call: Call) -> Group | None:
        name = call.parameters["name"]
        group = self._core.groups.find(name)
        if group is None:
            call.refuse(Outcome.NOT_FOUND, f"there is no group {name} on this node")
        return group

    def _show(self, groups: Sequence[Group], done: Callable[[Groups], None]) -> None:
        def rendered() -> Iterator[object]:
            for group in groups:
                wanted_by = self._core.membership.wanted_by(group)
                keys = sorted(group.committed_offsets.keys() | group.holders.keys() | wanted_by.keys())
                members = [
                    MemberStatus(member.client_id, len(member.cursors), entry.unresponsive)
                    for member, entry in group.members.items()
                ]
                yield GroupStatus(group.name, group.generation, members, [])
                for key in keys:
                    yield self._partition(group, key, len(wanted_by.get(key, ())))

        list_in_slices(self._context.loop, rendered(), GroupStatus, done)

    def _partition(self, group: Group, key: Key, wanted_by: int) -> GroupPartition:
        log = self._core.engine.log(*key)
        committed, cursor = group.committed_offsets.get(key), group.holders.get(key)
        offset = committed.next_offset if committed is not None else -1
        return GroupPartition(
            topic=key[0],
            partition=key[1],
            committed=offset,
            applied=group.applied_in(log) if log is not None else -1,
            log_id=committed.log_id if committed is not None else "",
            durable_end=log.durable_end if log is not None else -1,
            lag=log.durable_end - max(offset, 0) if log is not None else -1,
            lag_seconds=self._lag_seconds(log, max(offset, 0)) if log is not None else -1,
            attempts=committed.attempts if committed is not None else 0,
            reason=group.reasons.get(key, ""),
            refresh=_refresh(committed),
            standbys=wanted_by - (1 if cursor is not None else 0),
            member=self._cursor(cursor) if cursor is not None else None,
        )

    def _lag_seconds(self, log: Log, next_offset: int) -> float:
        return round(self._context.lags.seconds(log, next_offset, self._context.loop.now()), 1)

    def _cursor(self, cursor: Cursor) -> CursorStatus:
        return CursorStatus(
            client_id=cursor.member.client_id,
            topic=cursor.log.topic,
            partition=cursor.log.partition,
            state=cursor.state,
            why=cursor.why,
            isolated=cursor.isolated,
            revoking=cursor.revoking,
            next_offset=cursor.next_offset,
            acked=cursor.acked,
            in_flight=cursor.in_flight,
            in_flight_bytes=cursor.in_flight_bytes,
            generation=cursor.generation,
            lease=cursor.lease,
            last_ack_seconds_ago=round(self._context.loop.now() - cursor.last_ack, 3) if cursor.last_ack else None,
        )

    def _client(self, session: Session) -> ClientStatus:
        transport = session.transport
        return ClientStatus(
            client_id=session.client_id,
            address=transport.peer,
            group=session.group.name if session.group is not None else "",
            bytes_in=transport.bytes_in,
            bytes_out=transport.bytes_out,
            backlog_bytes=transport.backlog,
            paused=transport.paused,
            idle_seconds=round(self._context.loop.now() - transport.last_received, 3),
            waits_for=session.waits_for,
            partitions=[],
        )

    # ---- changing ----

    def delete(self, call: Call) -> None:
        group = self._find(call)
        if group is None:
            return
        problem = self._operations.delete(group)
        if problem:
            call.refuse(Outcome.CONFLICT, problem)
        else:
            self._core.engine.when_stored(lambda: call.done(Outcome.OK, ""))

    def reset_offsets(self, call: Call) -> None:
        name, wanted = call.parameters["name"], call.body
        assert isinstance(wanted, MoveRequest)
        problem = check_group_name(name) if name else "the name of the group is missing"
        if problem:
            call.refuse(Outcome.INVALID, problem)
            return

        def moved(moves: list[Move], outcome: Outcome, why: str) -> None:
            if outcome is not Outcome.OK:
                call.refuse(outcome, why)
                return
            lines = [OffsetChange(log.topic, log.partition, before, after) for log, before, after in moves]
            call.answer(OffsetChanges(name, wanted.dry_run, lines))

        # What is refused or only looked at creates no group.
        group = self._core.groups.find(name) or Group(name, self._context.loop.now())
        self._operations.move(group, wanted, moved)

    def refresh(self, call: Call) -> None:
        group = self._find(call)
        if group is None:
            return

        def begun(outcome: Outcome, message: str) -> None:
            if outcome is Outcome.OK:
                self._show([group], lambda found: call.answer(found[0]))
            else:
                call.refuse(outcome, message)

        self._operations.refresh(group, call.body, begun)


def _refresh(committed: GroupOffset | None) -> RefreshStatus | None:
    if committed is None or not committed.reset_id:
        return None
    return RefreshStatus(
        committed.reset_id,
        committed.reset_from,
        committed.target if committed.refreshing else None,
        "refreshing" if committed.refreshing else "ready",
    )
