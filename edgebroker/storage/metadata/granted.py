"""Which producer id belongs to which client id: what was granted, bounded.

Those that were granted first go when there are too many: a client that comes back with its id keeps it, and most
clients take a client id of their own at each start.
"""

from __future__ import annotations

from collections.abc import Mapping

MOST_PRODUCERS = 100_000


class GrantedProducers:
    """Owned by the loop thread. `stored`: (producer id, epoch) by client id, the oldest grant first."""

    def __init__(self, stored: Mapping[str, tuple[int, int]]) -> None:
        self._producers = dict(stored)
        self._owners = {producer_id: client_id for client_id, (producer_id, _) in self._producers.items()}

    def of(self, client_id: str) -> tuple[int, int] | None:
        """What was granted to a client id."""
        return self._producers.get(client_id)

    def owner(self, producer_id: int) -> str | None:
        """The client id that a producer id was granted to; None when that is not known (any more)."""
        return self._owners.get(producer_id)

    def grant(self, client_id: str, producer_id: int, epoch: int) -> str | None:
        """Bind them; the client id that is forgotten for it, if one is."""
        self._forget(client_id)
        self._producers[client_id] = (producer_id, epoch)
        self._owners[producer_id] = client_id
        if len(self._producers) <= MOST_PRODUCERS:
            return None
        oldest = next(iter(self._producers))
        self._forget(oldest)
        return oldest

    def _forget(self, client_id: str) -> None:
        before = self._producers.pop(client_id, None)
        if before is not None:
            self._owners.pop(before[0], None)
