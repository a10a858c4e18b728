"""All nodes below one, as far as it has heard of them: what they say of themselves, and which of them are silent.

Reports come up the tree from node to node; nothing is sent while nothing changes. Who is alive follows from who is
connected: a node says which of its children it lost, and what it had said before about those that it did not lose is
still true. So a node at the end of a line that is cut is as silent as the line. No socket, no file, no clock.

Which of two reports about a node is the newer one: the higher number of the same run of it; of two runs the one that
arrived last, but word of a lost node never wins over that of a connected one. Who is connected here is not connected
elsewhere as another run: what another child says of it waits until the node is lost here (decision 60).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence

import msgspec

from edgebroker.common import json
from edgebroker.common.runtime.newest import Newest
from edgebroker.pipe.report import MAX_REPORT_BYTES, NodeState, Report

MAX_NODES, KEPT_FOR_CHILDREN = 65_536, 4096
# Nodes that were never heard of: so many at once, and so many a second. A child tells the others again.
NEW_AT_ONCE, NEW_A_SECOND = 5000, 500
MAX_CLAIMS, CLAIM_SECONDS = 1000, 60.0
# Two machines with the same identity speak in turns, each with the name of its own run.
TWIN_CHANGES, TWIN_SECONDS = 3, 600.0


class TooManyNewError(Exception):
    """More new nodes than are taken at a time."""


class FleetMember:
    """A node below. `route` is the uid of the child through which it is reached (its own when it is one), "" when it
    was only heard of. `silent_since` and `behind_at` are monotonic seconds here; `runs` are those before
    the present one, `run_changes` when an earlier one came back."""

    __slots__ = (
        "address",
        "behind",
        "behind_at",
        "boot",
        "candidates",
        "labels",
        "level",
        "managed",
        "name",
        "number",
        "parent",
        "raw",
        "region",
        "route",
        "run_changes",
        "runs",
        "silent_since",
        "skew",
        "standby",
        "told_at",
        "told_behind",
        "uid",
    )  # fmt: skip

    def __init__(self, uid: str) -> None:
        self.uid = uid
        self.raw: bytes = b""
        self.route = self.parent = ""
        self.silent_since: float | None = None
        self.behind = self.behind_at = self.told_behind = self.told_at = 0.0
        self.skew = 0
        self.runs: tuple[str, ...] = ()
        self.run_changes: tuple[float, ...] = ()

    def say(self, report: Report, raw: bytes) -> None:
        """Take over a report."""
        self.raw, self.name, self.address = raw, report.name, report.address
        self.level, self.region = sys.intern(report.level), sys.intern(report.region)
        self.labels, self.parent = report.labels, sys.intern(report.parent)
        self.boot, self.number = report.boot, report.number
        self.managed, self.candidates, self.standby = report.managed, report.candidates, report.standby

    def report(self) -> Report:
        """The report as it was made; decoded again, for thousands of them are kept."""
        return json.decode(self.raw, Report)

    def another_run(self, boot: str, now: float) -> None:
        """A run that was there before, and is back behind a later one: two machines with one identity."""
        if boot in self.runs:
            self.run_changes = (*self.run_changes[1 - TWIN_CHANGES :], now)
        self.runs = (*self.runs[-3:], self.boot)

    def contested(self, now: float) -> None:
        """Another run of it has been connected elsewhere for long: as good as three changes."""
        self.run_changes = (now,) * TWIN_CHANGES

    def twins(self, now: float) -> bool:
        """Do two machines use this identity?"""
        return len(self.run_changes) == TWIN_CHANGES and now - self.run_changes[0] < TWIN_SECONDS

    def lag(self, now: float) -> float:
        """Seconds that the node is behind the one above it, by now."""
        return self.behind + (now - self.behind_at) if self.behind else 0.0


class Fleet:
    """Owned by the loop thread. `top` is the uid of the node that keeps it."""

    def __init__(self, top: str) -> None:
        self._top = top
        self.members: dict[str, FleetMember] = {}
        # What the node above has not been told yet, in the order in which it changed.
        self._changed: dict[str, None] = {}
        # Runs of nodes that an operator removed: that they are lost is not news.
        self.removed: dict[str, str] = {}
        # Who follows whom, and whom the last batch was about.
        self._below: dict[str, set[str]] = {}
        self.taken: list[str] = []
        self.refused = 0
        self._new, self._new_at = float(NEW_AT_ONCE), 0.0
        # What children say of nodes that are connected elsewhere as another run: by whom, and since when.
        self._claims = Newest[str, tuple[NodeState, str, float]](MAX_CLAIMS)

    def take(self, state: NodeState, route: str, now: float, *, connected: bool = False) -> FleetMember | None:
        """Hear of a node; the member when that was news. `connected`: the child that says it is connected now, and what
        it says of itself finds a place although others have passed on too much. Raises msgspec.DecodeError for what is
        not a report, TooManyNewError when the node has to be told of later."""
        raw = bytes(state.report)
        if len(raw) > MAX_REPORT_BYTES * 2:
            raise msgspec.ValidationError(f"a report of {len(raw)} bytes")
        report = json.decode(raw, Report)
        silent, itself = state.silent >= 0, connected and report.uid == route
        if silent and route == self._claims.get(report.uid, (None, None))[1]:
            del self._claims[report.uid]
        if report.uid == self._top or (silent and self.removed.get(report.uid) == report.boot):
            return None
        member = self.members.get(report.uid)
        if member is not None and route != member.route == member.uid and self.silent_for(member, now) < 0:
            # A child of its own, while it is connected: what others say of it waits, whichever run they speak of.
            if not silent:
                self._claim(report.uid, state, route, now)
            return None
        if member is None:
            if len(self.members) >= (MAX_NODES if itself else MAX_NODES - KEPT_FOR_CHILDREN):
                self.refused += 1
                return None
            if route and not (itself or self._admits(now)):
                raise TooManyNewError
            member = self.members[report.uid] = FleetMember(report.uid)
        elif report.boot == member.boot:
            if report.number < member.number:
                return None
        elif silent and (member.silent_since is None or member.silent_since > now - state.silent):
            return None
        elif not (silent or itself) and self._is_elsewhere(member, route) and self.silent_for(member, now) < 0:
            self._claim(report.uid, state, route, now)
            return None
        else:
            self._restarted(member, report, now)
        self._below.get(member.parent, set()).discard(member.uid)
        member.say(report, raw)
        self._below.setdefault(member.parent, set()).add(member.uid)
        member.route = route
        member.silent_since = now - state.silent if silent else None
        if route != member.uid:  # of a child of its own the node above knows better than the child
            member.behind, member.behind_at, member.skew = state.behind, now, state.skew
            member.told_behind, member.told_at = state.behind, now
        self._changed[member.uid] = None
        return member

    def _admits(self, now: float) -> bool:
        """Is there room for another node that was never heard of?"""
        self._new = min(NEW_AT_ONCE, self._new + (now - self._new_at) * NEW_A_SECOND)
        self._new_at = now
        if self._new < 1:
            return False
        self._new -= 1
        return True

    def _is_elsewhere(self, member: FleetMember, route: str) -> bool:
        """Is a node reached through another child? Those below a hub move with it, and its new parent tells of them."""
        top = member
        for one in self.path(member):
            top = one
        return member.route != "" and route not in (member.route, top.uid if top.parent == self._top else "")

    def _claim(self, uid: str, state: NodeState, route: str, now: float) -> None:
        since = self._claims[uid][2] if uid in self._claims else now
        self._claims.put(uid, (state, route, since))

    def settle(self, now: float) -> list[FleetMember]:
        """Believe what was said of nodes that are not connected any more where they were."""
        found = []
        for uid, (state, route, since) in list(self._claims.items()):
            member = self.members.get(uid)
            if member is not None and self.silent_for(member, now) < 0:
                if now - since > CLAIM_SECONDS:
                    member.contested(now)
                continue
            try:
                member = self.take(state, route, now)
            except TooManyNewError:
                continue  # it was removed meanwhile, and there will be room
            self._claims.pop(uid, None)
            if member is not None:
                found.append(member)
        return found

    def _restarted(self, member: FleetMember, report: Report, now: float) -> None:
        """Another run of a node has not heard of those below it: they are lost until it has."""
        known = report.boot in member.runs
        member.another_run(report.boot, now)
        if not known:
            for uid in self._below.get(member.uid, ()):
                self.lost(uid, now)

    def children(self) -> list[FleetMember]:
        """The nodes that follow the one that keeps this."""
        return [self.members[uid] for uid in self._below.get(self._top, ()) if uid in self.members]

    def lost(self, uid: str, since: float) -> None:
        """A child is not connected any more."""
        member = self.members.get(uid)
        if member is not None and member.silent_since is None:
            member.silent_since = since
            self._changed[uid] = None

    def found(self, uid: str) -> None:
        """A child is connected again."""
        member = self.members.get(uid)
        if member is not None and member.silent_since is not None:
            member.silent_since = None
            self._changed[uid] = None

    def measured(self, uid: str, behind: float, now: float) -> None:
        """How far a child is behind this node; passed on when it is not what was to be expected."""
        member = self.members.get(uid)
        if member is None:
            return
        expected = member.told_behind + (now - member.told_at) if member.told_behind else 0.0
        member.behind, member.behind_at = behind, now
        if bool(behind) != bool(member.told_behind) or abs(behind - expected) > 10.0 + expected / 5:
            self._changed[uid] = None

    def remove(self, uid: str) -> None:
        """Forget a node until it is connected again."""
        since = [one.silent_since for one in self.path(self.members[uid]) if one.silent_since is not None]
        member = self.forget(uid)
        self.removed[uid] = member.boot
        if since:
            for below in self._below.get(uid, ()):  # that was all that told that they are silent
                self.lost(below, min(since))

    def forget(self, uid: str) -> FleetMember:
        """A node is not below this one any more."""
        member = self.members.pop(uid)
        self._below.get(member.parent, set()).discard(uid)
        self._changed.pop(uid, None)
        self.refused = 0  # there is room again
        return member

    def put_back(self, uids: Sequence[str]) -> None:
        """What the node above was to be told did not arrive."""
        self._changed = {**dict.fromkeys(uid for uid in uids if uid in self.members), **self._changed}

    def tell_all(self) -> None:
        """Another node is above this one, or the one above has forgotten: everything is news."""
        self._changed = dict.fromkeys(self.members)

    @property
    def changed(self) -> bool:
        return bool(self._changed)

    def take_changes(self, most_bytes: int, now: float) -> list[NodeState]:
        """What the node above has to be told, as much as fits; it is told by then."""
        found: list[NodeState] = []
        self.taken = []
        for uid in list(self._changed):
            member = self.members[uid]
            most_bytes -= len(member.raw) + 64
            if most_bytes < 0 and found:
                break
            del self._changed[uid]
            self.taken.append(uid)
            member.told_behind, member.told_at = member.lag(now), now
            found.append(
                NodeState(
                    report=msgspec.Raw(member.raw),
                    silent=round(now - member.silent_since, 1) if member.silent_since is not None else -1.0,
                    behind=round(member.lag(now), 1),
                    skew=member.skew,
                )
            )
        return found

    def path(self, member: FleetMember) -> Iterator[FleetMember]:
        """The node and those above it, up to the top."""
        seen = 0
        while member is not None and seen < 8:
            yield member
            seen += 1
            found = self.members.get(member.parent)
            if found is None:
                return
            member = found

    def silent_for(self, member: FleetMember, now: float) -> float:
        """Seconds since this node, or one above it, was lost; -1 when it is connected. The child that told of it is one
        above it, whatever its report says of its parent; one that is not known counts as lost since it told last."""
        lost = [now - one.silent_since for one in self.path(member) if one.silent_since is not None]
        through = self.members.get(member.route)
        if through is None and member.route and not lost:
            return now - member.behind_at
        if through is not None and through.silent_since is not None:
            lost.append(now - through.silent_since)
        return max(lost, default=-1.0)

    def lag(self, member: FleetMember, now: float) -> float:
        """Seconds that the node is behind the top: each hop's own measure, added up."""
        return sum(one.lag(now) for one in self.path(member))


def matches(member: FleetMember, wanted: dict[str, str]) -> bool:
    """Has a node these labels? `name`, `level` and `region` count as labels; a region contains its parts."""
    for key, value in wanted.items():
        if key == "region":
            if member.region != value and not member.region.startswith(value + "/"):
                return False
        elif value != (getattr(member, key) if key in ("name", "level") else member.labels.get(key)):
            return False
    return True


def find(members: Iterable[FleetMember], name: str) -> list[FleetMember]:
    """The nodes of a name, or the one of a uid."""
    return [member for member in members if name in (member.uid, member.name)]
