"""A connection on the loop: what to send waits in a queue, what arrives goes to the owner.

The queue holds bytes and file extents. An owner that produces without being asked (delivery) looks at `backlog`
first: a slow peer costs a cursor, not a queue. Above the high watermark the peer is no longer read; a peer that takes
nothing for ten seconds while there is something to send is cut.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Protocol

from edgebroker.common.errors import ProtocolError
from edgebroker.network.io.channel import WANTS_DISK, Channel
from edgebroker.network.io.loop import READ, WRITE, Loop
from edgebroker.network.wire.connection import ReceiveBuffer

HIGH_BYTES = 1 << 20
LOW_BYTES = 256 << 10
# Of one connection in a turn: calls of the system, and pieces in one of them.
MOST_SENDS, MOST_PARTS = 32, 64


class Owner(Protocol):
    """What a transport belongs to."""

    def on_data(self, buffer: ReceiveBuffer, received: int) -> None:
        """Bytes are in buffer.room; raise ProtocolError to have the connection closed."""

    def on_drained(self) -> None:
        """Everything queued was handed to the kernel."""

    def on_closed(self, reason: str) -> None:
        """The connection is over; called once."""


class _NoOwner:
    """Of a transport that is closed."""

    def on_data(self, buffer: ReceiveBuffer, received: int) -> None: ...
    def on_drained(self) -> None: ...
    def on_closed(self, reason: str) -> None: ...


NO_OWNER = _NoOwner()


class FileRange:
    """Stored bytes to send: [position, position + length) of a file held open until released.

    `load` is asked for the bytes when they are not in the page cache; it answers supply() later.
    """

    __slots__ = ("data", "fd", "length", "load", "position", "release")

    def __init__(
        self,
        fd: int,
        position: int,
        length: int,
        release: Callable[[], None],
        load: Callable[[FileRange], None],
    ) -> None:
        self.fd, self.position, self.length, self.release, self.load = fd, position, length, release, load
        self.data: memoryview | None = None


class Transport:
    """Owned by the loop thread."""

    __slots__ = (
        "_buffer",
        "_channel",
        "_fd",
        "_interest",
        "_loop",
        "_out",
        "_owner",
        "_paused",
        "_receives_again",
        "_waiting_for_disk",
        "backlog",
        "bytes_in",
        "bytes_out",
        "closed",
        "closing",
        "last_progress",
        "last_received",
        "peer",
    )

    def __init__(self, loop: Loop, channel: Channel, buffer: ReceiveBuffer, owner: Owner, peer: str) -> None:
        self._loop, self._channel, self._buffer, self._owner, self.peer = loop, channel, buffer, owner, peer
        self._fd = channel.fileno()
        self._out: deque[bytes | memoryview | FileRange] | None = None
        self._paused = self._waiting_for_disk = self._receives_again = False
        self.closing = ""
        self.closed = False
        self.backlog = 0
        self.bytes_in = self.bytes_out = 0
        self.last_received = self.last_progress = loop.now()
        self._interest = READ
        loop.register(self._fd, READ, self._ready)

    def send(self, data: bytes | memoryview) -> None:
        """Send or queue."""
        if self.closed:
            return
        if not self.backlog:
            try:
                sent = self._channel.send((data,))
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self.close(error.strerror or "sending failed")
                return
            self.bytes_out += sent
            if sent == len(data):
                return
            data = memoryview(data)[sent:]
            self.last_progress = self._loop.now()
        self._queue(data, len(data))

    def send_pair(self, head: bytes, data: memoryview) -> None:
        """Send or queue a head and the bytes that follow it, in one call to the kernel when possible."""
        if self.closed:
            return
        if self.backlog:
            self._queue(head, len(head))
            self._queue(data, len(data))
            return
        try:
            sent = self._channel.send((head, data))
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.close(error.strerror or "sending failed")
            return
        self.bytes_out += sent
        if sent == len(head) + len(data):
            return
        self.last_progress = self._loop.now()
        if sent < len(head):
            self._queue(head[sent:], len(head) - sent)
            sent = len(head)
        rest = data[sent - len(head) :]
        self._queue(rest, len(rest))

    def send_parts(self, parts: Sequence[bytes | memoryview]) -> None:
        """Send or queue several pieces, in one call to the kernel when possible."""
        if self.closed:
            return
        sent = 0
        if not self.backlog:
            try:
                sent = self._channel.send(parts)
            except BlockingIOError:
                pass
            except OSError as error:
                self.close(error.strerror or "sending failed")
                return
            self.bytes_out += sent
            self.last_progress = self._loop.now()
        for part in parts:
            if sent >= len(part):
                sent -= len(part)
            else:
                rest = memoryview(part)[sent:]
                sent = 0
                self._queue(rest, len(rest))

    def send_file(self, head: bytes, extent: FileRange) -> None:
        """Send or queue a head and stored bytes behind it."""
        if self.closed:
            extent.release()
            return
        if not self.backlog:
            try:
                sent = self._channel.send((head,), more=True)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                extent.release()
                self.close(error.strerror or "sending failed")
                return
            self.bytes_out += sent
            if sent < len(head):
                self._queue(head[sent:], len(head) - sent)
            elif self._sent_at_once(extent):
                return
        else:
            self._queue(head, len(head))
        self._queue(extent, extent.length)
        if self._waiting_for_disk:
            extent.load(extent)

    def _sent_at_once(self, extent: FileRange) -> bool:
        """Send what the socket takes now, before anything is queued. True when nothing is left (or all is over)."""
        try:
            sent, wants = self._channel.send_file(extent.fd, extent.position, extent.length)
        except OSError as error:
            extent.release()
            self.close(error.strerror or "sending failed")
            return True
        extent.position += sent
        extent.length -= sent
        self.bytes_out += sent
        self._waiting_for_disk = wants == WANTS_DISK
        if extent.length:
            return False
        extent.release()
        return True

    def supply(self, extent: FileRange, data: memoryview | None, error: str) -> None:
        """The answer to extent.load: the rest of its bytes, or why they cannot be had (the peer is cut)."""
        self._waiting_for_disk = False
        if self.closed:
            return
        if data is None:
            self.close(error)
            return
        extent.data = data
        self._flush()

    def hold_back(self, unsent: int) -> None:
        """Let the kernel queue no more than this in front of what is on its way: what is sent later waits less."""
        self._channel.hold_back(unsent)

    @property
    def unacknowledged(self) -> int:
        """Bytes that the kernel took and the peer's has not acknowledged."""
        return self._channel.unacknowledged

    @property
    def identity(self) -> str:
        """Who the peer is, as far as the channel knows."""
        return self._channel.identity

    @property
    def held_up(self) -> bool:
        """Does so much wait for the peer that nothing should be added?"""
        return self.backlog > HIGH_BYTES

    @property
    def paused(self) -> bool:
        return self._paused

    @property
    def reading(self) -> bool:
        """False while the peer is not read: it was paused, or takes too little of what is queued for it."""
        return bool(self._interest & READ)

    def pause(self) -> None:
        """Stop reading the peer."""
        if not self._paused:
            self._paused = True
            self._update()

    def resume(self) -> None:
        """Read the peer again, unless this is closing; its idle clock starts again."""
        if self._paused and not self.closing:
            self._paused = False
            self._update()

    def close(self, reason: str) -> None:
        """Drop what is queued and close. The owner is told once."""
        if self.closed:
            return
        self.closed = True
        if self._interest:
            self._loop.unregister(self._fd)
        self._channel.close()
        for item in self._out or ():
            if isinstance(item, FileRange):
                item.release()
        self._out = None
        owner, self._owner = self._owner, NO_OWNER  # they refer to each other: the collector would find them late
        owner.on_closed(reason)

    def forked(self) -> None:
        """This is a child of the process that opened it: let go of the descriptor, and of nothing else. The selector,
        which is the parent's too, is not asked to forget it."""
        self.closed = True
        self._channel.close()

    def close_when_drained(self, reason: str) -> None:
        """Send what is queued, then close; nothing more is read."""
        self.closing = reason
        if not self.backlog:
            self.close(reason)
        else:
            self.pause()

    def _queue(self, item: bytes | memoryview | FileRange, length: int) -> None:
        if self._out is None:
            self._out = deque()
        if not self._out:
            self.last_progress = self._loop.now()
        self._out.append(item)
        self.backlog += length
        self._update()

    def _update(self) -> None:
        if self.closed:
            return
        held_up = self.backlog > HIGH_BYTES or (self.backlog > LOW_BYTES and not self._interest & READ)
        interest = 0 if self._paused or held_up else READ
        if self.backlog and not self._waiting_for_disk:
            interest |= WRITE
        if interest == self._interest:
            return
        if interest & READ and not self._interest & READ:
            self.last_received = self._loop.now()  # it could not know that it was not read
        if interest == 0:
            self._loop.unregister(self._fd)
        elif self._interest == 0:
            self._loop.register(self._fd, interest, self._ready)
        else:
            self._loop.modify(self._fd, interest, self._ready)
        self._interest = interest
        if self._channel.pending:
            self._receive_again()

    def _ready(self, mask: int) -> None:
        if mask & WRITE:
            self._flush()
        if mask & READ and self._interest & READ and not self.closed:
            self._receive()

    def _receive(self) -> None:
        try:
            received = self._channel.recv_into(self._buffer.room)
        except BlockingIOError:
            return
        except OSError as error:
            self.close(error.strerror or "receiving failed")
            return
        if received == 0:
            self.close("the peer closed the connection")
            return
        self.bytes_in += received
        self.last_received = self._loop.now()
        try:
            self._owner.on_data(self._buffer, received)
        except ProtocolError as error:
            self.close_when_drained(str(error))
        if not self.closed and self._channel.pending:
            self._receive_again()

    def _receive_again(self) -> None:
        """In a turn: the descriptor will not tell of what is left."""
        if not self._receives_again:
            self._receives_again = True
            self._loop.call_in_turn(self._receive_pending)

    def _receive_pending(self) -> None:
        self._receives_again = False
        if self._interest & READ and not self.closed:
            self._receive()

    def _flush(self) -> None:
        out = self._out
        for _ in range(MOST_SENDS):  # what is left goes out in the next turn
            if not out or self.closed:
                break
            item = out[0]
            try:
                sent, done = self._send_file(item) if isinstance(item, FileRange) else self._send_bytes()
            except BlockingIOError:
                break
            except OSError as error:
                self.close(error.strerror or "sending failed")
                return
            if sent:
                self.last_progress = self._loop.now()
                self.backlog -= sent
                self.bytes_out += sent
            if not done:
                break
        if self.closed:
            return
        self._update()
        if not self.backlog:
            if self.closing:
                self.close(self.closing)
            else:
                self._owner.on_drained()

    def _send_bytes(self) -> tuple[int, bool]:
        """Send what is queued before the next file, many small pieces at once."""
        out = self._out
        assert out is not None
        parts: list[bytes | memoryview] = []
        for item in islice(out, MOST_PARTS):
            if isinstance(item, FileRange):
                break
            parts.append(item)
        left = sent = self._channel.send(parts)
        for part in parts:
            if left < len(part):
                out[0] = memoryview(part)[left:]
                return sent, False
            left -= len(part)
            out.popleft()
        return sent, True

    def _send_file(self, item: FileRange) -> tuple[int, bool]:
        assert self._out is not None
        if item.data is not None:
            sent = self._channel.send((item.data,))
            item.data = item.data[sent:]
            item.length -= sent
        else:
            sent, wants = self._channel.send_file(item.fd, item.position, item.length)
            item.position += sent
            item.length -= sent
            if wants == WANTS_DISK:
                self._waiting_for_disk = True
                item.load(item)
                return sent, False
        if item.length:
            return sent, False
        item.release()
        self._out.popleft()
        return sent, True
