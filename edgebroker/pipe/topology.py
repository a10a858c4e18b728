"""Who may feed whom: the ordered list of candidate parents of each node, from what the registry knows.

    pinned parents, as the operator wrote them, while they are hubs
    hubs of the nearest level above, then of the levels above that; among them
        those whose region contains the node's, the closest first; then those of other regions (not pos)
        in an order of the node's own, so that the children of a region spread over its hubs

A hub that is being drained is nobody's candidate; a node without an address is no hub. No socket, no file, no clock.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from edgebroker.common.crc32c import crc32c
from edgebroker.pipe.follower import LEVELS
from edgebroker.pipe.report import MAX_CANDIDATES


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

    def put(self, uid: str, level: str, region: str, address: str) -> bool:
        """A node as it is now; True when that changes whose candidate it is."""
        before = self._hubs.get(uid)
        if before is not None and (before.level, before.region, before.address) == (level, region, address):
            return False
        changed = self.remove(uid)
        if not address or level not in LEVELS[:-1]:
            return changed
        hub = self._hubs[uid] = Hub(uid, level, region, address)
        self._places.setdefault((level, region), {})[uid] = hub
        self._levels[level][uid] = hub
        return True

    def remove(self, uid: str) -> bool:
        """Forget a hub; True when it was one."""
        hub = self._hubs.pop(uid, None)
        if hub is None:
            return False
        place = self._places[hub.level, hub.region]
        del place[uid], self._levels[hub.level][uid]
        if not place:
            del self._places[hub.level, hub.region]
        return True

    def candidates(self, uid: str, level: str, region: str) -> list[str]:
        """The addresses at which a node shall look for a parent, the best first."""
        found: dict[str, None] = dict.fromkeys(
            [self._hubs[pinned].address for pinned in self._pinned(uid)][:MAX_CANDIDATES]
        )
        for hub in self._automatic(uid, level, region):
            if len(found) >= MAX_CANDIDATES:
                break
            found[hub.address] = None
        return list(found)

    def must_leave(self, uid: str, parent: str) -> bool:
        """Shall a node give up the parent that it has?"""
        pins = self._pinned(uid)
        return parent in self.draining or bool(pins and parent not in pins)

    def _pinned(self, uid: str) -> list[str]:
        """The pinned parents that there are: not those that were removed, or are being drained."""
        return [pinned for pinned in self.pins.get(uid, ()) if pinned in self._hubs and pinned not in self.draining]

    def _automatic(self, uid: str, level: str, region: str) -> Iterator[Hub]:
        above = list(reversed(LEVELS[: LEVELS.index(level)])) if level in LEVELS else []
        own = list(_containing(region))
        for upper in above:
            for place in own:
                yield from self._spread(uid, list(self._places.get((upper, place), {}).values()))
        for upper in above:
            if upper != "pos":
                yield from self._spread(uid, [one for one in self._levels[upper].values() if one.region not in own])

    def _spread(self, uid: str, hubs: Sequence[Hub]) -> list[Hub]:
        """In an order of the node's own that does not change with the hubs that come and go."""
        offered = [hub for hub in hubs if hub.uid not in self.draining and hub.uid != uid]
        return sorted(offered, key=lambda hub: crc32c((uid + hub.uid).encode()))


def _containing(region: str) -> Iterator[str]:
    """The region, those that contain it, and the whole."""
    while region:
        yield region
        region = region.rpartition("/")[0]
    yield ""
