"""The protocol without a socket: bytes in, events out. One table says which frame types each side may send.

A Connection keeps only the unfinished end of what it received; the bulk stays in the receive buffer that the loop
shares between all connections. Of a client's frames a broker takes so many at a time (a run of publishes counts as
one): the rest is kept, as one piece, and given by more(). After an error it is dead. Limits: 4 KiB until CONNECT was
granted, then max_frame; a frame that is larger is refused by its header and skipped without being buffered.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple, cast

from edgebroker.common.errors import LocalProtocolError, RemoteProtocolError
from edgebroker.common.messages import PublishRun
from edgebroker.network.wire import frames, framing
from edgebroker.network.wire.frames import FrameType

HEADROOM_BYTES = 64 << 10
RECEIVE_BYTES = 1 << 20
BEFORE_CONNECT_BYTES = 4096
MOST_EVENTS = 64
UNLIMITED = (1 << 63) - 1
# A larger length is not a frame that was meant: such a peer is not worth skipping for.
SKIP_BYTES = 64 << 20

FROM_CLIENT = frozenset(
    {
        FrameType.CONNECT, FrameType.PUBLISH, FrameType.SUBSCRIBE, FrameType.ACK, FrameType.HEARTBEAT,
        FrameType.RESET, FrameType.READY,
    }
)  # fmt: skip
FROM_BROKER = frozenset(
    {
        FrameType.SUBSCRIBE, FrameType.DELIVER, FrameType.ACK, FrameType.HEARTBEAT, FrameType.RESET, FrameType.READY,
    }
)  # fmt: skip

_REASONS = {
    2: "a frame length below 12",
    3: "an unknown frame type, or flags that are not zero",
    5: "a PUBLISH frame shorter than its own header",
}


class Role(Enum):
    CLIENT = "client"
    BROKER = "broker"


class Frame(NamedTuple):
    """A whole frame other than PUBLISH; the body is a view that is valid until the next receive()."""

    type: int
    correlation: int
    body: memoryview


class Refused(NamedTuple):
    """A frame that is too large; it is being skipped, the connection goes on."""

    type: int
    correlation: int
    size: int


Event = Frame | PublishRun | Refused


class ReceiveBuffer:
    """One buffer for all connections of a loop: room for an unfinished end, then room for what recv() brings."""

    def __init__(self, size: int = RECEIVE_BYTES) -> None:
        self._memory = memoryview(bytearray(HEADROOM_BYTES + size))
        self.room = self._memory[HEADROOM_BYTES:]

    def use(self, size: int) -> None:
        """Receive at most so many bytes at a time, and no more than there is room for."""
        self.room = self._memory[HEADROOM_BYTES : HEADROOM_BYTES + size]

    def joined(self, tail: bytes | bytearray, received: int) -> memoryview:
        """The unfinished end followed by what was received into `room`, without copying the latter."""
        start = HEADROOM_BYTES - len(tail)
        self._memory[start:HEADROOM_BYTES] = tail
        return self._memory[start : HEADROOM_BYTES + received]


class Connection:
    """`role` is this side's; `granted` becomes True when CONNECT is over (the owner sets it)."""

    __slots__ = (
        "_at",
        "_dead",
        "_most",
        "_needed",
        "_prefix",
        "_prefix_fields",
        "_rest",
        "_role",
        "_skip",
        "_tail",
        "granted",
        "max_frame",
    )

    def __init__(self, role: Role, max_frame: int) -> None:
        self._role, self._most = role, MOST_EVENTS if role is Role.BROKER else UNLIMITED
        self.max_frame = max_frame
        self.granted = role is Role.CLIENT
        self._tail: bytearray | bytes = b""
        # Whole frames behind those that were given, and where the next one begins.
        self._rest: memoryview | None = None
        self._at = self._needed = self._skip = 0
        self._dead = False
        self._prefix = b""
        self._prefix_fields = (0, "", 0)

    @property
    def waiting(self) -> bool:
        """Are there frames for more()? receive() has to wait for as long."""
        return self._rest is not None

    @property
    def held(self) -> int:
        """Bytes that are kept here: of an unfinished frame, and of frames that wait."""
        return len(self._tail) if self._rest is None else len(self._rest)

    @property
    def unfinished(self) -> int:
        """How long the frame is that has begun, as far as is known."""
        return self._needed

    def more(self) -> list[Event]:
        """The next events of what was received; their views stay valid. Raises RemoteProtocolError like receive()."""
        assert self._rest is not None
        return self._split(self._rest, self._at)

    def receive(self, buffer: ReceiveBuffer, received: int) -> list[Event]:
        """Take `received` bytes from buffer.room. Raises RemoteProtocolError; then the connection is over."""
        if self._dead or self._rest is not None:
            raise LocalProtocolError("this connection failed before" if self._dead else "frames are waiting")
        start = 0
        if self._skip:
            start = min(self._skip, received)
            self._skip -= start
            if start == received:
                return []
        tail = self._tail
        if not self.granted and len(tail) + received > BEFORE_CONNECT_BYTES:
            raise self._fail(f"more than {BEFORE_CONNECT_BYTES} bytes before CONNECT was answered")
        if not tail:
            data = buffer.room[start:received]
        elif len(tail) <= HEADROOM_BYTES:
            data = buffer.joined(tail, received)
        else:
            assert isinstance(tail, bytearray)
            tail += buffer.room[:received]
            if len(tail) < self._needed:
                return []
            data = memoryview(bytes(tail))
        return self._split(data, 0)

    def _split(self, data: memoryview, start: int) -> list[Event]:
        found, end, reason, (frame_type, correlation, size) = framing.split(data, start, self.max_frame, self._most)
        events = [self._event(data, raw) for raw in found]
        while reason > 1:
            if reason != 4 or size > SKIP_BYTES or not self.granted:
                raise self._fail(_REASONS.get(reason, f"a frame of {size} bytes; the limit is {self.max_frame}"))
            events.append(Refused(frame_type, correlation, size))
            end += size
            if end >= len(data):
                self._skip, self._tail, self._rest = end - len(data), b"", None
                return events
            # The refused frame is here already: what follows it is still to be read.
            most = max(0, self._most - len(events))
            found, end, reason, (frame_type, correlation, size) = framing.split(data, end, self.max_frame, most)
            events += [self._event(data, raw) for raw in found]
        rest_length = len(data) - end
        if rest_length and not reason:
            if self._rest is None:
                self._rest, self._at = memoryview(bytes(data[end:])), 0
            else:
                self._at = end
            return events
        self._rest = None
        self._needed = size
        if rest_length == 0:
            self._tail = b""
        elif rest_length > HEADROOM_BYTES or size > HEADROOM_BYTES:
            self._tail = bytearray(data[end:])
        else:
            self._tail = bytes(data[end:])
        return events

    def _event(self, data: memoryview, raw: tuple[int, int, int, int] | tuple[int, int, int, bytes]) -> Event:
        if raw[0] == FrameType.PUBLISH:
            _, run_start, run_end, spans = cast(tuple[int, int, int, bytes], raw)
            if self._role is Role.CLIENT or not self.granted:
                raise self._fail("a PUBLISH frame is not allowed here")
            prefix = data[run_start:run_end]
            if prefix != self._prefix:
                try:
                    self._prefix_fields = frames.read_publish_prefix(prefix)
                except RemoteProtocolError as error:
                    raise self._fail(str(error)) from error
                self._prefix = bytes(prefix)
            return PublishRun(*self._prefix_fields, data, spans)
        frame_type, correlation, start, end = cast(tuple[int, int, int, int], raw)
        allowed = FROM_CLIENT if self._role is Role.BROKER else FROM_BROKER
        if frame_type not in allowed or (not self.granted and frame_type != FrameType.CONNECT):
            raise self._fail(f"a {FrameType(frame_type).name} frame is not allowed here")
        return Frame(frame_type, correlation, data[start:end])

    def _fail(self, why: str) -> RemoteProtocolError:
        self._dead = True
        return RemoteProtocolError(why)
