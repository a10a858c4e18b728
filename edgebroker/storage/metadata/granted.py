"""Which producer id belongs to which client id: what was granted, bounded.

When there are too many, the one goes that was connected longest ago: a client that comes back with its id keeps it, and
most clients take a client id of their own at each start. One that is connected stays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice

MOST_PRODUCERS = 100_000
# So many are looked at for one that can go.
LOOK = 50


class GrantedProducers:
    """Owned by the loop thread. `stored`: (producer id, epoch) by client id, the oldest grant first. `note` is told
    what is to be stored of a client id; None: nothing any more."""

    def __init__(
        self, stored: Mapping[str, tuple[int, int]], note: Callable[[str, tuple[int, int] | None], None]
    ) -> None:
        self._note = note
        self._producers = dict(stored)
        self._owners = {producer_id: client_id for client_id, (producer_id, _) in self._producers.items()}

    def of(self, client_id: str) -> tuple[int, int] | None:
        """The producer id and epoch bound to a client id; None for a client that is not known."""
        return self._producers.get(client_id)

    def owner(self, producer_id: int) -> str | None:
        """The client id that a producer id was granted to; None when that is not known (any more)."""
        return self._owners.get(producer_id)

    def seen(self, client_id: str) -> None:
        """It is connected, or was until now: others go before."""
        known = self._producers.pop(client_id, None)
        if known is not None:
            self._producers[client_id] = known

    def grant(self, client_id: str, producer_id: int, epoch: int, connected: Callable[[str], bool]) -> None:
        """Bind them. Of too many, one that is not `connected` is forgotten."""
        self._forget(client_id)
        self._producers[client_id] = (producer_id, epoch)
        self._owners[producer_id] = client_id
        self._note(client_id, (producer_id, epoch))
        if len(self._producers) <= MOST_PRODUCERS:
            return
        for oldest in list(islice(self._producers, LOOK)):
            if not connected(oldest):
                self._forget(oldest)
                self._note(oldest, None)
                return
            self.seen(oldest)

    def _forget(self, client_id: str) -> None:
        before = self._producers.pop(client_id, None)
        if before is not None:
            self._owners.pop(before[0], None)
