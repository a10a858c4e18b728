"""Clients by their id: who is connected, which producer id and epoch belong to an id, and who was fenced."""

from __future__ import annotations

import os
from collections import Counter
from typing import NamedTuple

from edgebroker.storage.engine import GroupStore

MAX_EPOCH = 32767


class ProducerId(NamedTuple):
    """-1, -1: none."""

    id: int = -1
    epoch: int = -1


class Producers:
    """Owned by the loop thread. `store` remembers what was granted."""

    def __init__(self, store: GroupStore) -> None:
        self._store = store
        self._connected: Counter[str] = Counter()

    def connected(self, client_id: str) -> bool:
        """Has a client of this id a connection now?"""
        return client_id in self._connected

    def arrived(self, client_id: str) -> None:
        """A connection of this client begins."""
        self._connected[client_id] += 1

    def gone(self, client_id: str) -> None:
        """A connection of this client is over."""
        self._store.producers.seen(client_id)
        self._connected[client_id] -= 1
        if not self._connected[client_id]:
            del self._connected[client_id]

    def is_fenced(self, client_id: str, own: ProducerId) -> bool:
        """Has another producer of this client id begun after this one?"""
        known = self._store.producers.of(client_id)
        return known is not None and min(own) >= 0 and own.id == known[0] and own.epoch < known[1]

    def grant(self, client_id: str, own: ProducerId, *, new_epoch: bool) -> ProducerId:
        """The id bound to this client id. A client that was here before keeps its epoch, unless it wants a new one;
        another client of the name gets the next epoch, which fences the one before. An id that was granted to another
        client id is nobody else's."""
        known = self._store.producers.of(client_id)
        mine = min(own) >= 0 and self._store.producers.owner(own.id) in (None, client_id)
        mine = mine and (known is None or known[0] == own.id)
        if mine and not new_epoch and (known is None or known[1] <= own.epoch):
            granted = own
        else:
            producer_id, epoch = known or (own if mine else ProducerId())
            epoch = max(epoch, own.epoch if mine else -1) + 1
            if producer_id < 0 or epoch > MAX_EPOCH:
                producer_id, epoch = int.from_bytes(os.urandom(8), "big") >> 1, 0
            granted = ProducerId(producer_id, epoch)
        if granted != known:
            self._store.producers.grant(client_id, *granted, self.connected)
        return granted
