"""Who may feed whom: the ordered list of candidate parents of each node, from what the registry knows.

    pinned parents, as the operator wrote them, while they are hubs
    hubs of the nearest level above, then of the levels above that; among them
        those whose region contains the node's, the closest first; then those of other regions (not pos, and not in a
        fleet)
        in an order of the node's own, so that the children of a region spread over its hubs; at most four of the first
        place and two of each other one, those that are lost behind the others

    last, for the hubs next to the registry: the standbys among them, one of which may be promoted to be their parent

A hub that is being drained is not a candidate; a node without an address is not a hub. No socket, no file, no clock.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator

from edgebroker.common.crc32c import crc32c
from edgebroker.common.levels import LEVELS
from edgebroker.pipe.report import MAX_CANDIDATES

# So many of one place, and of each further one: a list shall not end with a region whose hubs are all lost.
FIRST_PLACE, OTHER_PLACES = 4, 2
FEW = 32


class Hub:
    """A node that may have children."""

    __slots__ = ("address", "level", "region", "uid")

    def __init__(self, uid: str, level: str, region: str, address: str) -> None:
        self.uid, self.level, self.region, self.address = uid, level, region, address


class Topology:
    """The hubs of the tree, by level and region."""

    def __init__(self) -> None:
        self._hubs: dict[str, Hub] = {}
        self._places: dict[tuple[str, str], dict[str, Hub]] = {}
        self._levels: dict[str, dict[str, Hub]] = {level: {} for level in LEVELS}
        self.pins: dict[str, list[str]] = {}
        self.draining: set[str] = set()
        # Hubs that keep a copy of the registry.
        self.standbys: set[str] = set()
        # Only hubs whose region contains a node's: in a fleet no other one may be above it.
        self.strict: Callable[[], bool] = lambda: False
        # Hubs that were not heard of for long: they come last.
        self.lost: set[str] = set()
        # The hubs of a place with many, by the hash of their uid.
        self._rings: dict[tuple[str, str | None], list[tuple[int, str]]] = {}

    def put(self, uid: str, level: str, region: str, address: str) -> bool:
        """A node as it is now; True when that changes whose candidate it is."""
        before = self._hubs.get(uid)
        if before is not None and (before.level, before.region, before.address) == (level, region, address):
            return False
        changed = self.remove(uid)
        if not address or level not in LEVELS[:-1]:
            return changed
        hub = self._hubs[uid] = Hub(uid, level, region, address)
        self._rings.clear()
        self._places.setdefault((level, region), {})[uid] = hub
        self._levels[level][uid] = hub
        return True

    def remove(self, uid: str) -> bool:
        """Forget a hub; True when it was one."""
        hub = self._hubs.pop(uid, None)
        if hub is None:
            return False
        self._rings.clear()
        place = self._places[hub.level, hub.region]
        del place[uid], self._levels[hub.level][uid]
        if not place:
            del self._places[hub.level, hub.region]
        return True

    def candidates(self, uid: str, level: str, region: str) -> list[str]:
        """The addresses at which a node shall look for a parent, the best first."""
        found: dict[str, None] = dict.fromkeys(
            [self._hubs[pinned].address for pinned in self._pinned(uid, region)][:MAX_CANDIDATES]
        )
        for hub in self._automatic(uid, level, region):
            if len(found) >= MAX_CANDIDATES:
                break
            found[hub.address] = None
        if uid in self._hubs and len(found) < MAX_CANDIDATES:
            peers = sorted(self.standbys - {uid} - self.draining)
            found |= dict.fromkeys(self._hubs[one].address for one in peers if self._same_level(one, level))
        return list(found)[:MAX_CANDIDATES]

    def _same_level(self, uid: str, level: str) -> bool:
        return uid in self._hubs and self._hubs[uid].level == level

    def must_leave(self, uid: str, parent: str, region: str, connected: Callable[[str], bool]) -> bool:
        """Shall a node give up the parent that it has? Pins count while one of them is `connected`."""
        pins = self._pinned(uid, region)
        if pins and parent not in pins and any(connected(pinned) for pinned in pins):
            return True
        hub, own = self._hubs.get(parent), self._hubs.get(uid)
        beside = hub is not None and own is not None and own.level == hub.level  # it was promoted
        elsewhere = hub is not None and not beside and not self.may_serve(hub.level, hub.region, region)
        return parent in self.draining or elsewhere

    def may_serve(self, level: str, region: str, below: str) -> bool:
        """May a hub of this level and region be asked by nodes of the region `below`?"""
        return region in _containing(below) or not (level == "pos" or self.strict())

    def _pinned(self, uid: str, region: str) -> list[str]:
        """The pinned parents that may serve: not those that were removed, are being drained, or are elsewhere now."""
        hubs = [self._hubs[pinned] for pinned in self.pins.get(uid, ()) if pinned in self._hubs]
        return [
            hub.uid for hub in hubs if hub.uid not in self.draining and self.may_serve(hub.level, hub.region, region)
        ]

    def _automatic(self, uid: str, level: str, region: str) -> Iterator[Hub]:
        above = list(reversed(LEVELS[: LEVELS.index(level)])) if level in LEVELS else []
        own = list(_containing(region))
        most = FIRST_PLACE
        for upper in above:
            for place in own:
                found = self._spread(uid, (upper, place), most)
                most = OTHER_PLACES if found else most
                yield from found
        for upper in above if not self.strict() else ():
            if upper != "pos":
                yield from (hub for hub in self._spread(uid, (upper, None), MAX_CANDIDATES) if hub.region not in own)

    def _spread(self, uid: str, place: tuple[str, str | None], most: int) -> list[Hub]:
        """Some hubs of a place (None: of the whole level), in an order of the node's own that hardly changes with hubs
        that come and go: by a hash of both where they are few, else those that follow the node on a ring."""
        level, region = place
        hubs = self._levels[level] if region is None else self._places.get((level, region), {})
        if len(hubs) <= FEW:
            found = sorted(hubs.values(), key=lambda hub: crc32c((uid + hub.uid).encode()))
        else:
            ring = self._rings.get(place)
            if ring is None:
                ring = self._rings[place] = sorted((crc32c(hub.uid.encode()), hub.uid) for hub in hubs.values())
            at = bisect_left(ring, (crc32c(uid.encode()), uid))
            found = [hubs[ring[(at + step) % len(ring)][1]] for step in range(min(len(ring), 4 * most))]
        offered = [hub for hub in found if hub.uid not in self.draining and hub.uid != uid]
        return sorted(offered, key=lambda hub: hub.uid in self.lost)[:most]


def _containing(region: str) -> Iterator[str]:
    """The region, those that contain it, and the whole."""
    while region:
        yield region
        region = region.rpartition("/")[0]
    yield ""
