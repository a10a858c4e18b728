"""The registry: which nodes there are, and where each shall look for its parent.

    a report comes up the tree -> remembered -> candidates compared with those the node has -> word down the pipe

Kept in registry.db: who was there and when, what operators pinned, drained and removed. What nodes say of their health
is not: they say it again. A node hears of a change as soon as the pipe carries it, again after a minute until its
report says that it has it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from edgebroker.broker.fleet.inbox import Inbox
from edgebroker.broker.fleet.pending_directives import PendingDirectives
from edgebroker.broker.fleet.standby import RegistryCopy, make_copy
from edgebroker.common.levels import LEVELS
from edgebroker.common.outcome import Done, Outcome
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler, in_turns
from edgebroker.pipe.fleet import MAX_NODES, Fleet, FleetMember, find, matches
from edgebroker.pipe.report import MAX_CANDIDATES, NodeState, ParentAssignment, Report, StandbyDirective, digest
from edgebroker.pipe.topology import Topology
from edgebroker.storage.metadata.registry import NodeRow, RegistryState, RegistryStore

log = logging.getLogger(__name__)

TICK_SECONDS = 1.0
SWEEP_SECONDS = 30.0
SLICE, LOOK = 500, 50
# A hub that was not heard of for so long comes behind the others.
LOST_SECONDS = 3600.0
TELL_AGAIN_SECONDS, LONGEST_TELL_AGAIN_SECONDS = 60.0, 3600.0
COPY_SECONDS = 5.0
MOST_STANDBYS = 8
NO_BOOT = "0" * 16


class Registrar:
    """Owned by the loop thread. `itself` makes the report of the node that keeps the registry."""

    def __init__(
        self,
        scheduler: Scheduler,
        clock: Clock,
        inbox: Inbox,
        store: RegistryStore,
        itself: Callable[[], Report],
        pending: PendingDirectives,
        standbys: list[str],
    ) -> None:
        self._scheduler, self._clock, self._inbox, self._store = scheduler, clock, inbox, store
        self._itself, self._pending, self._standbys = itself, pending, standbys
        # What the standbys shall have; made again when something of it has changed, but not all the time.
        self.copy = make_copy("", [], {}, set(), {}, [])
        self._copied: tuple[int, ...] = ()
        self._notes = 0
        self._copy_due = 0.0
        self._copy_told: dict[str, tuple[int, float]] = {}
        self._fleet: Fleet = inbox.fleet
        self.topology = Topology()
        # What was written of each node: what it said of its place, and whether it was connected.
        self._written: dict[str, tuple[object, ...]] = {}
        # To whom what was told: the digest of the list and whether to drain, when, and how long to wait before it is
        # told again.
        self._told: dict[str, tuple[tuple[int, bool], float, float]] = {}
        # What was so when a node needed no word; the version grows with every change of the topology.
        self._settled: dict[str, tuple[object, ...]] = {}
        # Nodes that have been at a pinned parent: if they left it, it was lost, and they come back by themselves.
        self._obeyed: set[str] = set()
        self._version = 0
        self._left: deque[str] = deque()
        self._sweep_due = 0.0

    def start(self) -> None:
        """Remember what was stored, and begin to look after the nodes."""
        self._begin(self._store.load())

    def begun_after(self, path: Path) -> bool:
        """Is the file of this registry a newer one?"""
        return self._store.written_at() > path.stat().st_mtime

    def take_over(self, copy: RegistryCopy) -> None:
        """Begin with what another node knew, which this one takes the place of."""
        self._store.begin_again()
        state = RegistryState()
        state.removed, state.pins, state.draining = dict(copy.removed), dict(copy.pins), {*copy.draining}
        for hub in copy.hubs:
            state.nodes[hub.uid] = NodeRow(msgspec.json.encode(hub), False, self._clock.wall_ms())
        own = self._itself().uid
        state.nodes.pop(own, None)
        changes = self._store.changes
        changes.removed.update(state.removed)
        changes.pins.update(state.pins)
        changes.draining.update(dict.fromkeys(state.draining, True))
        self._begin(state)
        self._written.clear()  # all of it is news to the file
        for member in self._fleet.members.values():
            self._note(member)
        self._pending.adopt([one for one in copy.directives if one.directive.uid != own])
        self._store.write()

    def _begin(self, state: RegistryState) -> None:
        now, wall = self._scheduler.now(), self._clock.wall_ms()
        self._fleet.removed = state.removed
        self._inbox.forgets = False
        self.topology.pins, self.topology.draining = state.pins, state.draining
        for uid, row in state.nodes.items():
            seen = state.wall_ms if row.connected else row.seen_ms
            silent = max(0.0, (wall - seen) / 1000)
            try:
                member = self._fleet.take(NodeState(report=msgspec.Raw(row.report), silent=silent), "", now)
            except msgspec.DecodeError as error:
                log.warning("node %s is not understood: %s", uid, error)
                continue
            if member is not None:
                self._written[uid] = _place(member, False)
                self.topology.put(uid, member.level, member.region, member.address)
        self._put_itself()
        self._tick()

    def _put_itself(self) -> None:
        own = self._itself()
        if self.topology.put(own.uid, own.level, own.region, own.address):
            self._changed()

    def _changed(self) -> None:
        """The topology is another one: look at all nodes soon."""
        self._version += 1
        self._sweep_due = 0.0

    def stop(self) -> bool:
        """Store what is left; True when all of it is durable."""
        for member in self._fleet.members.values():
            self._note(member)
        self._store.changes.wall_ms = self._clock.wall_ms()
        return self._store.stop(5.0)

    @property
    def failed(self) -> str:
        """Why the registry cannot be stored now."""
        return self._store.failed

    # ---- hearing ----

    def heard(self, member: FleetMember) -> None:
        """There is news about a node."""
        if self.topology.put(member.uid, member.level, member.region, member.address):
            self._changed()  # it may be the parent that others wait for
        if member.silent_since is None and self._fleet.removed.pop(member.uid, None) is not None:
            self._store.changes.removed[member.uid] = None  # it is back: when it is lost again, that is news
        self._note(member)
        self._direct(member)

    def _note(self, member: FleetMember) -> None:
        connected = self._fleet.silent_for(member, self._scheduler.now()) < 0
        place = _place(member, connected)
        lost = self._fleet.silent_for(member, self._scheduler.now()) > LOST_SECONDS
        if lost != (member.uid in self.topology.lost) and member.address:
            (self.topology.lost.add if lost else self.topology.lost.discard)(member.uid)
            self._changed()
        if self._written.get(member.uid) != place:
            self._written[member.uid] = place
            self._notes += bool(member.address)
            silent = max(0.0, self._fleet.silent_for(member, self._scheduler.now()))
            seen_ms = self._clock.wall_ms() - int(silent * 1000)
            self._store.changes.nodes[member.uid] = NodeRow(member.raw, connected, seen_ms)

    def assign(self, report: Report) -> ParentAssignment:
        """The parents of a node that has none, and asks. That it is there is known once it reports: who asks can say
        what it likes."""
        wanted = self.topology.candidates(report.uid, report.level, report.region)
        return ParentAssignment(uid=report.uid, candidates=wanted)

    # ---- telling ----

    def _tick(self) -> None:
        self._scheduler.call_later(TICK_SECONDS, self._tick)
        now = self._scheduler.now()
        if not self._left and now >= self._sweep_due:
            self._sweep_due = now + SWEEP_SECONDS
            self._put_itself()
            self._left.extend(self._fleet.members)
            self._store.changes.wall_ms = self._clock.wall_ms()
        self._sweep()
        self._keep_copies(now)
        self._store.write()

    def _keep_copies(self, now: float) -> None:
        """Standbys shall have a copy of what is known here."""
        versions = (self._version, self._notes, self._pending.version)
        if now >= self._copy_due and versions != self._copied:
            self._copy_due, self._copied = now + COPY_SECONDS, versions
            self.copy = self._make_copy()
            standbys = {member.uid for member in self._find_standbys()}
            if standbys != self.topology.standbys:
                self.topology.standbys = standbys
                self._changed()
        for uid in self.topology.standbys:
            member = self._fleet.members.get(uid)
            if member is None or member.standby == self.copy.digest:
                continue
            digest, at = self._copy_told.get(uid, (0, 0.0))
            if digest == self.copy.digest and now < at + TELL_AGAIN_SECONDS:
                continue
            if self._inbox.direct(StandbyDirective(uid=uid, digest=self.copy.digest)):
                self._copy_told[uid] = (self.copy.digest, now)

    def _find_standbys(self) -> list[FleetMember]:
        """The children that keep a copy: those that are named, or the first hubs. One stays while it is lost."""
        hubs = [one for one in self._fleet.children() if one.address and one.level in LEVELS[1:-1]]
        if self._standbys:
            return [one for one in hubs if one.name in self._standbys or one.uid in self._standbys]
        return sorted(hubs, key=lambda one: (one.uid not in self.topology.standbys, one.uid))[:MOST_STANDBYS]

    def _make_copy(self) -> RegistryCopy:
        own = self._itself().uid
        hubs = [
            Report(
                uid=one.uid,
                name=one.name,
                level=one.level,
                version="",
                boot=NO_BOOT,  # the name of a run is for those on the way to the node only
                number=0,
                region=one.region,
                labels=one.labels,
                address=one.address,
                parent=one.parent,
                managed=one.managed,
            )
            for one in sorted(self._fleet.members.values(), key=lambda one: one.uid)
            if one.address and one.level in LEVELS
        ]
        topology = self.topology
        return make_copy(own, hubs, topology.pins, topology.draining, self._fleet.removed, self._pending.stored())

    def _sweep(self) -> None:
        """Look at some of the nodes: has each the candidates that it should, is it still there?"""
        for _ in range(min(SLICE, len(self._left))):
            member = self._fleet.members.get(self._left.popleft())
            if member is not None:
                self._note(member)
                self._direct(member)
        if self._left:
            self._scheduler.call_later(0.0, self._sweep)

    def _direct(self, member: FleetMember) -> None:
        if not member.managed or member.silent_since is not None or member.level not in LEVELS:
            return
        looked_at = (self._version, member.candidates, member.parent, member.level, member.region)
        if self._settled.get(member.uid) == looked_at:
            return
        wanted = self.topology.candidates(member.uid, member.level, member.region)
        if member.parent in self.topology.pins.get(member.uid, ()):
            self._obeyed.add(member.uid)
        obeyed = member.uid in self._obeyed
        leave = bool(wanted) and self.topology.must_leave(
            member.uid, member.parent, member.region, lambda pinned: not obeyed and self._is_connected(pinned)
        )
        meant = digest(wanted), leave
        if (meant[0] == member.candidates or not wanted) and not leave:
            self._told.pop(member.uid, None)
            self._settled[member.uid] = looked_at
            return
        now = self._scheduler.now()
        before, at, wait = self._told.get(member.uid, (None, 0.0, 0.0))
        if before == meant and now < at + wait:
            return
        if self._inbox.direct(ParentAssignment(uid=member.uid, candidates=wanted, drain=leave)):
            wait = min(LONGEST_TELL_AGAIN_SECONDS, wait * 2) if before == meant and wait else TELL_AGAIN_SECONDS
            self._told[member.uid] = (meant, now, wait)

    def _is_connected(self, uid: str) -> bool:
        member = self._fleet.members.get(uid)
        return member is None or self._fleet.silent_for(member, self._scheduler.now()) < 0  # None: this node itself

    # ---- what operators decide ----

    def pin(self, name: str, parents: list[str], done: Done) -> None:
        """Pin the parents of a node, none to undo it: done once that is stored."""
        node = self._one(name, done)
        if node is None:
            return
        if isinstance(node, FleetMember) and not node.managed:
            done(
                Outcome.CONFLICT,
                f"{node.name} is not managed by the registry: set pipe.registry there, or change its pipe.parents",
            )
            return
        if len(parents) > MAX_CANDIDATES:
            done(Outcome.CONFLICT, f"a node is pinned to {MAX_CANDIDATES} parents at most")
            return
        uids = []
        for parent in parents:
            hub = self._one(parent, done)
            if hub is None:
                return
            levels = f"{hub.name} is a {hub.level} node, {node.name} a {node.level} node"
            if not {hub.level, node.level} <= {*LEVELS}:
                done(Outcome.CONFLICT, f"{levels}: unknown level; cannot order these two nodes")
                return
            if LEVELS.index(hub.level) >= LEVELS.index(node.level):
                done(Outcome.CONFLICT, f"{levels}; a parent must be above its child")
                return
            if not self.topology.may_serve(hub.level, hub.region, node.region):
                regions = f"{hub.name} is in region {hub.region!r}, {node.name} in {node.region!r}"
                done(Outcome.CONFLICT, f"{regions}; that of a parent has to contain that of its child")
                return
            if not hub.address:
                done(Outcome.CONFLICT, f"{hub.name} has no address for children; set pipe.address there")
                return
            uids.append(hub.uid)
        if uids:
            self.topology.pins[node.uid] = uids
        else:
            self.topology.pins.pop(node.uid, None)
        self._obeyed.discard(node.uid)
        self._store.changes.pins[node.uid] = uids
        self._decided(done)

    def drain(self, name: str, draining: bool, done: Done) -> None:
        """Move the children of a node elsewhere, or let it have some again."""
        node = self._one(name, done)
        if node is None:
            return
        (self.topology.draining.add if draining else self.topology.draining.discard)(node.uid)
        self._store.changes.draining[node.uid] = draining
        self._decided(done)

    def remove(self, name: str, done: Done) -> None:
        """Forget a node that is silent, with what was decided about it."""
        node = self._one(name, done)
        if node is None:
            return
        if not isinstance(node, FleetMember) or self._fleet.silent_for(node, self._scheduler.now()) < 0:
            done(Outcome.CONFLICT, f"{node.name} is connected; stop it first")
            return
        self._forget(node)
        self._decided(done)

    def remove_silent(self, seconds: float, labels: dict[str, str], done: Callable[[int, Outcome, str], None]) -> None:
        """Forget all nodes with these labels that were silent for so long, a few at a time; how many is told once that
        is stored."""
        removed = 0

        def look() -> Iterator[None]:
            nonlocal removed
            for rank, member in enumerate(list(self._fleet.members.values())):
                silent = self._fleet.silent_for(member, self._scheduler.now())
                if silent >= seconds and matches(member, labels) and self._fleet.members.get(member.uid) is member:
                    self._forget(member)
                    removed += 1
                if rank % LOOK == 0:
                    yield

        in_turns(self._scheduler, look(), lambda: self._decided(lambda outcome, why: done(removed, outcome, why)))

    def _forget(self, node: FleetMember) -> None:
        """With what was decided about it."""
        self._fleet.remove(node.uid)
        self.topology.remove(node.uid)
        self.topology.pins.pop(node.uid, None)
        self.topology.draining.discard(node.uid)
        self.topology.lost.discard(node.uid)
        self._told.pop(node.uid, None)
        self._written.pop(node.uid, None)
        self._settled.pop(node.uid, None)
        changes = self._store.changes
        changes.nodes[node.uid], changes.removed[node.uid] = None, node.boot
        changes.pins[node.uid], changes.draining[node.uid] = [], False
        if len(self._fleet.removed) > MAX_NODES:
            oldest = next(iter(self._fleet.removed))
            del self._fleet.removed[oldest]
            changes.removed[oldest] = None

    def _one(self, name: str, done: Done) -> FleetMember | Report | None:
        own = self._itself()
        found: list[FleetMember | Report] = [*find(self._fleet.members.values(), name)]
        found += [own] if name in (own.uid, own.name) else []
        if len(found) == 1:
            return found[0]
        if found:
            uids = ", ".join(member.uid for member in found)
            done(Outcome.CONFLICT, f"{name} is the name of {len(found)} nodes; say which by its uid: {uids}")
        else:
            done(Outcome.NOT_FOUND, f"the registry knows no node {name}")
        return None

    def _decided(self, done: Done) -> None:
        self._changed()

        def stored(error: str) -> None:
            done(Outcome.READ_ONLY if error else Outcome.OK, f"not stored: {error}" if error else "")

        self._store.write(stored)


def _place(member: FleetMember, connected: bool) -> tuple[object, ...]:
    """What is worth a row."""
    return (
        member.name, member.level, member.region, tuple(member.labels.items()), member.address, member.parent,
        member.boot, connected,
    )  # fmt: skip
