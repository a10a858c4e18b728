"""What peers have sent and a node cannot handle yet, of all its connections together, and what becomes of it.

Frames, heads and bodies that have begun wait for the rest; whole frames and requests wait for their turn. All of them
share a number of bytes. As they fill it, less is read at a time. When it is full, the connection is closed that has not
ended what it began for the longest time: an honest one ends it within milliseconds, and sends it again if not. What has
not come to its end by its deadline is closed in any case.
"""

from __future__ import annotations

from math import inf
from typing import NamedTuple

from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.network.io.transport import Transport
from edgebroker.network.wire.connection import ReceiveBuffer

# Of a connection that keeps the whole room busy: read so much at a time while a quarter of the bytes is used, and more
# when they are used up, so that what is small goes through.
WHOLE_BYTES, SHARED_BYTES, FULL_BYTES = 1 << 30, 64 << 10, 4 << 10


class _Kept(NamedTuple):
    """Bytes of a connection, and until when they have to be handled; inf: they wait for this node."""

    size: int
    deadline: float


class Receiving:
    """Owned by the loop thread. `limit` in bytes may change; `closed`: connections that were closed for it."""

    def __init__(self, scheduler: Scheduler, limit: int) -> None:
        self._scheduler, self.limit = scheduler, limit
        self._unfinished: dict[Transport, _Kept] = {}
        self._waiting: dict[Transport, _Kept] = {}
        self._buffers: list[ReceiveBuffer] = []
        self._room = WHOLE_BYTES
        self.bytes = self.closed = 0

    def buffer(self, size: int) -> ReceiveBuffer:
        """A buffer of so many bytes, of which less is used as the limit comes near."""
        made = ReceiveBuffer(size)
        made.use(self._room)
        self._buffers.append(made)
        return made

    def unfinished(self, transport: Transport, size: int, seconds: float, *, begun: bool) -> None:
        """So many bytes of something have come that needs more; `begun`: it is another thing than before, which has
        this much time."""
        before = self._unfinished.get(transport)
        if before is None or begun:
            self.handled(transport)
            self._unfinished[transport] = _Kept(size, self._scheduler.now() + seconds)
            self._count(size)
        else:
            self._unfinished[transport] = before._replace(size=size)
            self._count(size - before.size)

    def waits(self, transport: Transport, size: int) -> None:
        """So many bytes are whole, and wait for their turn or for the disk."""
        self.handled(transport)
        self._waiting[transport] = _Kept(size, inf)
        self._count(size)

    def handled(self, transport: Transport) -> None:
        """Nothing is kept of this connection, or it is over."""
        for kept in (self._unfinished, self._waiting):
            found = kept.pop(transport, None)
            if found is not None:
                self._count(-found.size)

    def sweep(self) -> None:
        """Close what is late."""
        now = self._scheduler.now()
        for transport in [one for one, kept in self._unfinished.items() if kept.deadline < now]:
            transport.close("what was begun did not come to its end in time")

    def _count(self, size: int) -> None:
        self.bytes += size
        while self.bytes > self.limit and self._unfinished and size > 0:
            oldest = next(iter(self._unfinished))
            self.closed += 1
            oldest.close("others need the room for what is not complete (limits.receive_bytes)")
            self.handled(oldest)
        share = self.bytes * 4 // self.limit
        room = WHOLE_BYTES if share < 1 else SHARED_BYTES if share < 4 else FULL_BYTES
        if room != self._room:
            self._room = room
            for buffer in self._buffers:
                buffer.use(room)
