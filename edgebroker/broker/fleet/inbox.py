"""What this node hears from the nodes below: their reports, who of its children is lost, how far each is behind."""

from __future__ import annotations

import logging
from collections.abc import Callable

import msgspec

from edgebroker.broker.feed.downstream import GRACE_SECONDS, Downstream
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.common import json
from edgebroker.common.outcome import Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.network.http.router import Call
from edgebroker.pipe.fleet import Fleet, FleetMember, TooManyNewError
from edgebroker.pipe.report import NEW_SESSION, NOT_A_CHILD, Batch, Directive, Heard, NodeState, Report

log = logging.getLogger(__name__)

WATCH_SECONDS, MEASURE_SECONDS, ASLEEP_SECONDS = 1.0, 10.0, 5.0
FORGET_SECONDS = 7 * 24 * 3600.0
SLICE = 50
LEAST_SKEW_SECONDS = 2


class Inbox:
    """Owned by the loop thread. `heard` is told of every node about which there is news, `urgent` when some of it shall
    go up at once."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Clock,
        metrics: Metrics,
        fleet: Fleet,
        downstream: Downstream,
        heard: Callable[[FleetMember], None],
        urgent: Callable[[], None],
    ) -> None:
        self._scheduler, self._clock, self._metrics = scheduler, clock, metrics
        self.fleet, self._downstream, self._heard = fleet, downstream, heard
        self._urgent = urgent
        # May a peer pass on what a node says of itself? By its certificate.
        self.may_report: Callable[[str, Report], bool] = lambda identity, report: True
        # Where the registry is kept, no node is forgotten until an operator says so.
        self.forgets = True
        # The last batch of each child: its session and number; and when the child was last connected.
        self._batches: dict[str, tuple[str, int]] = {}
        self._connected: dict[str, float] = {}
        # Those that said goodbye, until they report again: how far they are behind is measured on.
        self._leaving: set[str] = set()
        self._measure_due = 0.0
        self._watched_at = scheduler.now()

    def start(self) -> None:
        self._scheduler.call_later(WATCH_SECONDS, self._watch)

    def answer(self, call: Call) -> None:
        """POST /v1/tree/reports."""
        now, batch = self._scheduler.now(), call.body
        assert isinstance(batch, Batch)
        if batch.number and self._batches.get(batch.sender) != (batch.session, batch.number - 1):
            self._metrics.refused(NEW_SESSION)
            why = "this node does not know the previous batch; start a new session with number 0"
            call.refuse(Outcome.CONFLICT, why, NEW_SESSION)
            return
        if call.peer != self._downstream.peer_of(batch.sender, now) or self._downstream.rules(
            call.identity, batch.sender, ""
        ):
            self._metrics.refused(NOT_A_CHILD)
            why = f"node {batch.sender} is not connected from {call.peer}; a report comes from a child, with its poll"
            call.refuse(Outcome.CONFLICT, why, NOT_A_CHILD)
            return
        elsewhere: list[str] = []
        urgent = False
        for state in batch.nodes:
            known = len(self.fleet.members)
            try:
                if not self.may_report(call.identity, json.decode(state.report, Report)):
                    self._metrics.reports_refused += 1
                    continue
                member = self.fleet.take(state, batch.sender, now, connected=True)
            except TooManyNewError:
                why = "more new nodes than are taken at a time; tell the rest in ten seconds, in a new session"
                call.refuse(Outcome.OVERLOADED, why)
                return
            except msgspec.DecodeError as error:
                self._metrics.reports_refused += 1  # what is wrong with one says nothing about the others
                log.warning("a report that %s passed on is not understood: %s", batch.sender, error)
                continue
            if member is None:
                elsewhere += self._elsewhere(state, batch.sender)
                continue
            self._metrics.reports_received += 1
            # Others may look for a parent now: one that is lost, or a hub that is new.
            urgent = urgent or state.silent >= 0 or (len(self.fleet.members) > known and bool(member.address))
            if member.uid == batch.sender:
                member.skew = self._skew(batch.wall_ms)
            self._heard(member)
        self._batches[batch.sender] = (batch.session, batch.number)
        self._connected[batch.sender] = now
        if batch.leaving:
            self._leaving.add(batch.sender)
            self._lost(batch.sender, now)
        else:
            self._leaving.discard(batch.sender)
            self.fleet.found(batch.sender)
        if urgent:
            self._urgent()
        call.answer(Heard(elsewhere))

    def _elsewhere(self, state: NodeState, sender: str) -> list[str]:
        """The node that a child says it lost, when it is reached through another one."""
        uid = json.decode(state.report, Report).uid
        member = self.fleet.members.get(uid)
        gone = state.silent >= 0 and member is not None and member.route not in ("", sender)
        return [uid] if gone else []

    def _skew(self, wall_ms: int) -> int:
        seconds = round((wall_ms - self._clock.wall_ms()) / 1000)
        return seconds if abs(seconds) >= LEAST_SKEW_SECONDS else 0

    def _watch(self) -> None:
        self._scheduler.call_later(WATCH_SECONDS, self._watch)
        now, before = self._scheduler.now(), self._watched_at
        self._watched_at = now
        if now - before > ASLEEP_SECONDS:
            return  # this node itself was frozen: what was sent to it meanwhile is read first
        for member in self.fleet.settle(now):
            self._heard(member)
        measure = now >= self._measure_due
        if measure:
            self._measure_due = now + MEASURE_SECONDS
        self._watch_some(list(self._connected.items()), measure)

    def _watch_some(self, children: list[tuple[str, float]], measure: bool) -> None:
        """A slice a turn: to know how far each is behind means to look at every log it follows."""
        now = self._scheduler.now()
        if len(children) > SLICE:
            self._scheduler.call_later(0.0, lambda: self._watch_some(children[SLICE:], measure))
        for uid, seen in children[:SLICE]:
            member = self.fleet.members.get(uid)
            if member is None or member.route != uid:
                self._connected.pop(uid, None)  # it is reached through another child now
                self._leaving.discard(uid)
                self._batches.pop(uid, None)
                continue
            stream = self._downstream.child(uid)
            if stream is not None and self._downstream.hears(uid, now) and uid not in self._leaving:
                self._connected[uid] = now
                self.fleet.found(uid)
            elif now - seen > FORGET_SECONDS and self.forgets:
                self.fleet.forget(uid)
                continue
            elif stream is not None or now - seen > GRACE_SECONDS:
                self._lost(uid, stream.heard_at if stream is not None else seen)
            if measure:
                self.fleet.measured(uid, self._downstream.behind(uid), now)

    def _lost(self, uid: str, since: float) -> None:
        """A child is silent: the nodes above learn it at once."""
        member = self.fleet.members.get(uid)
        if member is not None and member.silent_since is None:
            self.fleet.lost(uid, since)
            self._urgent()

    def direct(self, order: Directive) -> bool:
        """Pass directives on, towards the node it is for; False when the way there is not known, or cut."""
        member = self.fleet.members.get(order.uid)
        child = self._downstream.child(member.route) if member is not None else None
        if child is None:
            return False
        child.direct(order)
        return True
