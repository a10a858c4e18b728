"""Resync: loading topics of this node again from its parent, one after the other, as an operator asks.

    waiting -> (the parent tells how much it is, NO_SPACE?) -> loading -> (as much as before? the right hours?)
            -> the pipe stands still -> switching -> done

Meanwhile the old data is served. Rows of what is under way are stored before each step, with the id that the operator
gave, so that a start after a crash goes on with the same resync. In place there is no copy: the log is recreated.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec
from msgspec.structs import replace

from edgebroker.broker.core import Core
from edgebroker.broker.mirror.fresh_copy import CopySettings, FreshCopy
from edgebroker.broker.mirror.parent_topic import ParentLog, parent_logs
from edgebroker.broker.mirror.upstream import Upstream
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.clock import Clock, second_of_day
from edgebroker.common.runtime.gather import gather
from edgebroker.common.runtime.hours import parse_hours
from edgebroker.network.http.call import HttpCall
from edgebroker.network.http.peers import Peers
from edgebroker.pipe.report import ResyncDirective, ResyncReport
from edgebroker.storage.engine import Log, MirrorEngine, TopicReplacements
from edgebroker.storage.types import ResyncPhase, ResyncRow

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
LEAST_SHARE = 0.9
# While the pipe stands still the copy catches up with what the old log has; else it is tried again.
CATCH_UP_SECONDS = 10.0
LOOK_SECONDS = 10.0
REPORTED = 4
MOST_TOLD = 120
# Rows of resyncs that are over, for those who ask.
KEPT = 32
UNDER_WAY = ("waiting", "loading", "switching")


class ResyncStatus(msgspec.Struct):
    """A resync: its state, and why it waits or failed."""

    id: str
    topic: str
    group: str
    state: str
    why: str


class Resyncs:
    """Owned by the loop thread."""

    def __init__(
        self,
        core: Core,
        engine: MirrorEngine,
        peers: Peers,
        clock: Clock,
        settings: CopySettings,
        upstream: Callable[[], Upstream | None],
    ) -> None:
        self._engine, self._clock, self._metrics = engine, clock, core.metrics
        self._peers, self._loop = peers, peers.loop
        self._groups, self._refreshes, self._rebase = core.groups, core.refreshes, core.rebase
        self.settings, self._upstream = settings, upstream
        self._rows: dict[str, ResyncRow] = {}
        # Requests that are being stored.
        self._ordered: dict[str, ResyncRow] = {}
        # What there is to say about those under way besides their phase.
        self._says: dict[str, tuple[str, str]] = {}
        self._copy: FreshCopy | None = None
        self._current = ""
        self._looked: dict[str, float] = {}
        self._busy = self._stopped = self._closing = False
        self._held_since = 0.0

    def start(self) -> None:
        """Go on with what was under way; before the node follows its parent."""
        # What a crash interrupted between two renames was finished when the store was opened.
        self._rows = {row.id: row for row in self._replacements.rows}
        self._replacements.drop_staging(lambda name: name in self._rows and self._under_way(name))
        if self._rows:
            self._remember(lambda error: None)
        self._tick()

    def stop(self) -> None:
        """End the copy; what came of it stays."""
        self._stopped = True
        if self._copy is not None:
            copy, self._copy = self._copy, None
            self._close(copy, lambda: None)

    @property
    def _replacements(self) -> TopicReplacements:
        found = self._engine.replacements
        assert found is not None
        return found

    @property
    def idle(self) -> bool:
        """Nothing of a copy is open."""
        return self._copy is None and not self._closing

    def _under_way(self, resync_id: str) -> bool:
        return self._rows[resync_id].phase in UNDER_WAY

    # ---- requests ----

    def order(self, order: ResyncDirective, done: Done) -> None:
        """Take an order; done once it is stored. The same id again changes only `force`, `accept` and `hours`."""
        if order.group:
            self._order_group(order, done)
            return
        try:
            parse_hours(order.hours)
        except ValueError as error:
            done(Outcome.INVALID, f"hours: {error}")
            return
        if self._upstream() is None:
            done(Outcome.CONFLICT, "this node has no parent to load from; set pipe.parents or pipe.registry")
            return
        mirrored = [name for name in self._engine.topics() if self._is_mirrored(name)]
        topics = [order.topic] if order.topic else sorted(mirrored)
        if not set(topics) <= set(mirrored):
            done(Outcome.NOT_FOUND, f"{order.topic} is not mirrored at this node")
            return
        ordered: dict[str, ResyncRow] = {}
        for number, topic in enumerate(topics):
            resync_id = order.id if order.topic else f"{int(order.id, 16) + number & (1 << 128) - 1:032x}"
            known = self._rows.get(resync_id)
            if known is not None and known.topic == topic and known.phase in UNDER_WAY:
                row = replace(known, force=order.force, accept=order.accept, hours=order.hours)
            elif known is not None:
                continue
            else:
                others = [one for one in self._rows.values() if one.topic == topic and one.phase in UNDER_WAY]
                if others:
                    done(Outcome.OVERLOADED, f"{topic} is being resynced already, by {others[0].id}; abort that first")
                    return
                row = ResyncRow(
                    id=resync_id, topic=topic, in_place=order.in_place, force=order.force, accept=order.accept,
                    hours=order.hours,
                )  # fmt: skip
            ordered[resync_id] = row

        def stored(error: str) -> None:
            for resync_id, row in ordered.items():
                self._ordered.pop(resync_id, None)
                if not error:  # it may have begun, or be over, since
                    now = self._rows.get(resync_id, row)
                    self._rows[resync_id] = replace(now, force=row.force, accept=row.accept, hours=row.hours)
            done(Outcome.READ_ONLY if error else Outcome.OK, error)

        self._ordered.update(ordered)
        self._remember(stored)

    def refused(self, order: ResyncDirective, why: str) -> None:
        """A directive from above cannot be done: the report tells that."""
        if order.id not in self._rows:
            self._rows[order.id] = ResyncRow(id=order.id, topic=order.topic, group=order.group, phase="failed", why=why)
            self._remember(lambda error: None)

    def _is_mirrored(self, topic: str) -> bool:
        return any(log.identity.origin != self._engine.node_uid for log in self._engine.partitions(topic))

    def _order_group(self, order: ResyncDirective, done: Done) -> None:
        group, logs = self._groups.find(order.group), self._engine.partitions(order.topic)
        if group is None or not logs:
            done(Outcome.NOT_FOUND, f"there is no group {order.group} that reads {order.topic} at this node")
            return
        known = self._rows.get(order.id)
        if known is not None:
            done(Outcome.OK, "")
            return

        def begun(outcome: Outcome, message: str) -> None:
            self._rows[order.id] = ResyncRow(
                id=order.id,
                topic=order.topic,
                group=order.group,
                phase="loading" if outcome is Outcome.OK else "failed",
                why=message,
            )
            self._remember(lambda error: done(outcome, message))

        one = gather(len(logs), begun)
        for partition in logs:
            self._refreshes.begin(group, partition, one)

    def abort(self, resync_id: str, done: Done) -> None:
        """Give a resync up before its switch; the copy goes, the old data stays."""
        row = self._rows.get(resync_id)
        if row is None or row.phase not in UNDER_WAY or row.group:
            done(Outcome.NOT_FOUND, f"no resync {resync_id} is under way at this node")
        elif row.phase == "switching" or self._busy:
            done(Outcome.OVERLOADED, "it is being switched just now")
        else:
            self._end(row, "failed", "aborted by an operator", done)

    def _remember(self, then: Callable[[str], None]) -> None:
        ended = [row.id for row in self._rows.values() if row.phase not in UNDER_WAY]
        for resync_id in ended[: max(0, len(ended) - KEPT)]:
            del self._rows[resync_id]
        self._replacements.remember(list({**self._rows, **self._ordered}.values()), then)

    # ---- the work ----

    def _tick(self) -> None:
        if self._stopped:
            return
        self._loop.call_later(TICK_SECONDS, self._tick)
        self._watch_groups()
        if not self._busy:
            row = self._next()
            if row is not None:
                self._current = row.id
                self._step(row)

    def _next(self) -> ResyncRow | None:
        """The one that is being loaded, else whichever waits and was not looked at for longest: one that has no room
        holds up no other."""
        rows = [row for row in self._rows.values() if row.phase in UNDER_WAY and not row.group]
        loading = [row for row in rows if row.phase == "loading"]
        if loading:
            return loading[0]
        now = self._loop.now()
        due = [row for row in rows if now - self._looked.get(row.id, -LOOK_SECONDS) >= LOOK_SECONDS]
        row = min(due, key=lambda row: self._looked.get(row.id, -LOOK_SECONDS), default=None)
        if row is not None:
            self._looked[row.id] = now
        return row

    def _watch_groups(self) -> None:
        for row in [one for one in self._rows.values() if one.group and one.phase == "loading"]:
            group = self._groups.find(row.group)
            committed_offsets = (
                [committed for key, committed in group.committed_offsets.items() if key[0] == row.topic]
                if group is not None
                else []
            )
            if not any(committed.refreshing for committed in committed_offsets):
                self._rows[row.id] = replace(row, phase="done" if group is not None else "failed")
                self._remember(lambda error: None)

    def _step(self, row: ResyncRow) -> None:
        upstream = self._upstream()
        if upstream is None:
            self._end(row, "failed", "this node follows no parent any more")
        elif row.phase == "waiting":
            self._ask_how_much(row, upstream)
        elif self._copy is None:
            self._open_copy(row, upstream)
        else:
            self._look(row, self._copy, upstream)

    def _ask_how_much(self, row: ResyncRow, upstream: Upstream) -> None:
        """What the parent has of the topic: is it the same log, is there room for it?"""
        if not upstream.connected:
            self._says[row.id] = ("waiting", f"no parent: {upstream.last_error}")
            return
        self._busy = True

        def told(status: int, answer: bytes, error: str) -> None:
            self._busy = False
            if self._stopped:
                return
            if error:
                self._says[row.id] = ("waiting", f"{upstream.address}: {error}")
                return
            try:
                there = parent_logs(answer)
            except msgspec.DecodeError as wrong:
                self._says[row.id] = ("waiting", f"malformed answer from {upstream.address}: {wrong}")
                return
            self._begin(self._rows[row.id], upstream, there)

        HttpCall(self._peers, upstream.address, "POST", f"/v1/pipe/topics/{row.topic}", b"", told)

    def _begin(self, row: ResyncRow, upstream: Upstream, parts: list[ParentLog]) -> None:
        logs = self._engine.partitions(row.topic)
        if len(parts) != len(logs):
            self._end(row, "failed", f"it has {len(parts)} partitions at the parent, {len(logs)} here")
            return
        others = any(part.log_id != one.identity.log_id for part, one in zip(parts, logs, strict=True))
        if others and not row.accept:
            self._end(row, "failed", "the parent has another log of that name; order it with --accept to take that")
            return
        there = sum(part.records for part in parts)
        if self._shrunk(row, there, logs):
            return
        if row.in_place:
            self._in_place(row, upstream)
            return
        needed, free = sum(part.bytes for part in parts), self._free()
        if needed > free:
            room = f"the copy takes {needed >> 20} MiB, {max(0, free) >> 20} MiB may be used"
            self._stuck(row, "no_space", f"NO_SPACE: {room}; free some, or order it with --in-place")
            return
        self._rows[row.id] = replace(
            row,
            phase="loading",
            targets=[part.durable_end for part in parts],
            log_ids=[part.log_id for part in parts],
        )
        self._busy = True
        self._remember(self._remembered)

    def _shrunk(self, row: ResyncRow, records: int, logs: list[Log]) -> bool:
        """Would suspiciously much be lost? Then an operator has to say that it is meant."""
        before = sum(one.records for one in logs)
        if records >= LEAST_SHARE * before or row.force:
            return False
        share = records * 100 // max(1, before)
        why = f"{records} records at the parent are {share} % of the {before} here: --force --id {row.id}, or abort"
        self._stuck(row, "shrunk", why)
        return True

    def _stuck(self, row: ResyncRow, state: str, why: str) -> None:
        """It waits for an operator, or for room."""
        if self._says.get(row.id, ("", ""))[0] != state:
            self._metrics.refused(state.upper())
            log.warning("resync %s of %s: %s", row.id, row.topic, why)
        self._says[row.id] = (state, why)

    def problems(self) -> dict[str, str]:
        """What an operator should see."""
        found = [
            f"{self._rows[resync_id].topic}: {why}"
            for resync_id, (state, why) in self._says.items()
            if state in ("no_space", "shrunk")
        ]
        return {"resync": "; ".join(found)} if found else {}

    def _remembered(self, error: str) -> None:
        self._busy = False
        if error:
            log.error("resyncs cannot be stored: %s", error)

    def _free(self) -> int:
        """Bytes that may be used before producers would be refused."""
        disk = self._engine.disk()
        return disk.usable if disk is not None else 0

    def _open_copy(self, row: ResyncRow, upstream: Upstream) -> None:
        log.warning("resync %s: loading %s again", row.id, row.topic)
        self._busy = self._closing = True

        def told(store: MirrorEngine | None, error: str) -> None:
            self._busy = self._closing = False
            if store is None:
                self._says[row.id] = ("loading", error)
                return
            try:
                copy = FreshCopy(store, row.topic, upstream.candidates.addresses, self.settings, self._peers)
            except (OSError, EdgeBrokerError) as failure:
                self._end(self._rows[row.id], "failed", f"the copy cannot be opened: {failure}")
                return
            if self._stopped or not self._under_way(row.id):
                self._close(copy, lambda: None)
            else:
                self._copy = copy

        self._replacements.open_copy(row.id, told)

    def _close(self, copy: FreshCopy, then: Callable[[], None]) -> None:
        self._closing = True

        def closed() -> None:
            self._closing = False
            then()

        copy.close(closed)

    def _look(self, row: ResyncRow, copy: FreshCopy, upstream: Upstream) -> None:
        """Is the copy complete, is it as much as before, may it be switched now?"""
        logs = self._engine.partitions(row.topic)
        copy.follow(upstream.candidates.addresses)
        if self._other_topic(row, copy, logs):
            self._end(row, "failed", "the topic was deleted, or is another one by now; order it again")
            return
        refusal = self._engine.refusal()
        if refusal is not None and refusal[0] is Outcome.DISK_FULL:
            self._give_way(row, copy)
            return
        same = all(new.identity.log_id == old.identity.log_id for new, old in zip(copy.logs, logs, strict=False))
        ends = [max(end, one.durable_end) if same else end for end, one in zip(row.targets, logs, strict=True)]
        if not copy.has(row.targets):
            have, want = sum(one.durable_end for one in copy.logs), sum(row.targets)
            self._says[row.id] = ("loading", copy.problem or f"{have} of {want}")
            return
        if self._shrunk(row, copy.records, logs):
            return
        if not parse_hours(row.hours).open(second_of_day(self._clock.wall_ms())):
            self._says[row.id] = ("held", f"it waits for {row.hours}")
            return
        self._busy = True
        self._held_since = self._loop.now()
        upstream.hold(row.topic)
        self._catch_up(row, copy, upstream, same, ends)

    def _other_topic(self, row: ResyncRow, copy: FreshCopy, logs: list[Log]) -> bool:
        """Is the topic, here or in the copy, not what it was when the resync began?"""
        if len(logs) != len(row.targets) or (row.log_ids and copy.log_ids not in ([], row.log_ids)):
            return True
        here = [one.identity.log_id for one in logs]
        return not row.accept and copy.log_ids not in ([], here)

    def _give_way(self, row: ResyncRow, copy: FreshCopy) -> None:
        """The disk has filled up: producers and the pipe need the room. It begins again when there is enough."""
        self._stuck(row, "no_space", "NO_SPACE: the disk filled up while the copy was loaded; it waits for room")
        self._rows[row.id] = replace(row, phase="waiting")
        self._copy = None
        self._busy = True

        def closed() -> None:
            self._replacements.drop_staging(lambda name: name != row.id)
            self._remember(self._remembered)

        self._close(copy, closed)

    def _catch_up(self, row: ResyncRow, copy: FreshCopy, upstream: Upstream, same: bool, ends: list[int]) -> None:
        """The pipe is down: until the copy has what the old logs have, no reader may lose a record by the switch."""
        logs = self._engine.partitions(row.topic)
        if self._stopped:
            return
        if self._upstream() is not upstream or len(logs) != len(ends):
            self._busy = False
            self._end(row, "failed", "the topic was deleted, or this node follows no parent any more")
            return
        ends = [max(end, one.durable_end) if same else end for end, one in zip(ends, logs, strict=True)]
        if self._replacements.quiet(row.topic) and copy.has(ends):
            self._switch(row, copy, upstream, same)
        elif self._loop.now() - self._held_since > CATCH_UP_SECONDS:
            self._says[row.id] = ("loading", "the copy does not come up to what is here; trying again")
            self._busy = False
            upstream.follow_again(row.topic)
        else:
            self._loop.call_later(0.02, lambda: self._catch_up(row, copy, upstream, same, ends))

    def _switch(self, row: ResyncRow, copy: FreshCopy, upstream: Upstream, same: bool) -> None:
        directory = self._replacements.staging(row.id)
        self._copy = None

        def closed() -> None:
            self._rows[row.id] = replace(self._rows[row.id], phase="switching")
            self._remember(remembered)

        def remembered(error: str) -> None:
            if error:
                switched(Outcome.READ_ONLY, error)
            elif self._upstream() is not upstream or not self._engine.partitions(row.topic):
                switched(Outcome.CONFLICT, "the topic was deleted, or this node follows no parent any more")
            else:
                self._replacements.replace(row.topic, directory / "topics" / row.topic, switched)

        def switched(outcome: Outcome, message: str) -> None:
            self._busy = False
            if self._upstream() is upstream:
                upstream.follow_again(row.topic)
            if outcome is Outcome.OK:
                for partition in self._engine.partitions(row.topic):
                    if same:
                        self._rebase.truncated(partition)
                    else:
                        self._rebase.recreated(partition, True)
                log.warning("resync %s: %s is the fresh copy from now on", row.id, row.topic)
                self._end(self._rows[row.id], "done", "")
            elif outcome.retryable:
                self._rows[row.id] = replace(self._rows[row.id], phase="loading")  # the copy is opened again
                self._remember(lambda error: None)
            else:
                self._end(self._rows[row.id], "failed", message)

        self._close(copy, closed)

    def _in_place(self, row: ResyncRow, upstream: Upstream) -> None:
        self._busy = True
        self._says[row.id] = ("switching", "the logs are recreated")
        upstream.hold(row.topic)

        def done(outcome: Outcome, message: str) -> None:
            self._busy = False
            if outcome is not Outcome.OK and self._upstream() is upstream:
                upstream.follow_again(row.topic)
            self._end(self._rows[row.id], "done" if outcome is Outcome.OK else "failed", message)

        def wait() -> None:
            if self._stopped:
                return
            if self._upstream() is not upstream:
                done(Outcome.CONFLICT, "this node follows no parent any more")
            elif self._replacements.quiet(row.topic):
                upstream.recreate(row.topic, done)
            else:
                self._loop.call_later(0.02, wait)

        wait()

    def _end(self, row: ResyncRow, phase: ResyncPhase, why: str, done: Done | None = None) -> None:
        (log.info if phase == "done" else log.error)("resync %s of %s is over: %s %s", row.id, row.topic, phase, why)
        self._rows[row.id] = replace(row, phase=phase, why=why)
        self._says.pop(row.id, None)
        self._looked.pop(row.id, None)
        self._metrics.resyncs_done += phase == "done"
        self._metrics.resyncs_failed += phase == "failed"

        def remembered(error: str) -> None:
            self._replacements.drop_staging(lambda name: name in self._rows and self._under_way(name))
            if done is not None:
                done(Outcome.READ_ONLY if error else Outcome.OK, error)

        def closed() -> None:
            self._remember(remembered)

        copy, self._copy = (self._copy, None) if self._current == row.id else (None, self._copy)
        if copy is not None:
            self._close(copy, closed)
        else:
            closed()

    # ---- telling ----

    def describe(self) -> list[ResyncStatus]:
        """For /v1/resyncs: the newest last."""
        return [
            ResyncStatus(row.id, row.topic, row.group, self._state(row), self._why(row)) for row in self._rows.values()
        ]

    def reports(self) -> list[ResyncReport]:
        """For the report of the node: the last ones of those under way, then those that failed, then the others."""
        rows = sorted(self._rows.values(), key=lambda row: (row.phase in UNDER_WAY, row.phase == "failed"))
        return [ResyncReport(row.id, row.topic, self._told(row)) for row in rows[-REPORTED:]]

    def _told(self, row: ResyncRow) -> str:
        """Its state; of one that failed also why."""
        state = self._state(row)
        return f"{state}: {row.why}"[:MOST_TOLD] if state == "failed" and row.why else state

    def _state(self, row: ResyncRow) -> str:
        if row.group and row.phase == "loading":
            return "refreshing"
        return self._says.get(row.id, (row.phase, ""))[0] if row.phase in UNDER_WAY else row.phase

    def _why(self, row: ResyncRow) -> str:
        return row.why or self._says.get(row.id, ("", ""))[1]
