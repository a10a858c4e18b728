"""What goes over the pipe: the poll of a child, and the frames with which its parent answers (docs/pipe.md).

The poll is JSON. The answer is a stream of frames; every frame begins with 32 bytes, big-endian:

     0  u32  bytes of payload behind this header
     4  u8   kind: 1 HELLO, 2 DATA, 3 STATE, 4 IDLE, 5 DIRECTIVE, 6 CONFIRM
     5  u8   flags of DATA: 1 CONTINUES (goes on where the last DATA of this line ended), 2 CHAINED (`chain` is told)
     6  u16  line: which entry of the poll's `logs` it is about
     8  u32  chain checksum before the batch at `offset`
    12  i64  offset of the batch in which the payload begins
    20  u32  bytes of that batch before the payload
    24  i64  durable end of the log at the parent

HELLO and STATE carry JSON (Hello, Refusal), DIRECTIVE a list of Directive (pipe/report.py), DATA stored bytes, which
may end anywhere, IDLE and CONFIRM nothing.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from enum import IntEnum, IntFlag, StrEnum
from fnmatch import translate
from itertools import pairwise
from typing import Annotated, NamedTuple

import msgspec
from msgspec import Meta

from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import RemoteProtocolError
from edgebroker.common.names import TRUST_TOPIC, is_own
from edgebroker.common.types import TopicSettings

VERSION = 1
HEADER = struct.Struct(">IBBHIqIq")
HEADER_BYTES = HEADER.size
assert HEADER_BYTES == 32
# JSON in a frame; a thousand topics with a thousand partitions fit.
MAX_JSON_BYTES = 64 << 20
MAX_LINES = 1 << 16
# Polls up to this size are remembered, so that they need not be sent again; a SamePoll takes no more than that.
MAX_SAME_BYTES, MAX_SAME_POLL_BYTES = 64 << 10, 120
MAX_PARTITIONS = 1024
WILD = frozenset("*?[")
# Of the patterns with wildcards in a poll, together: they become one expression, which takes time to build.
MAX_WILD_CHARACTERS = 4096
# A batch that a child shows to a parent that is behind, and all that one poll shows, but for the first.
MAX_BEYOND_BYTES, MOST_SHOWN_BYTES = 5 << 20, 1 << 20
# Logs in one Receipt.
MAX_CONFIRMED = 200

_Offset = Annotated[int, Meta(ge=0, le=1 << 62)]
_Place = Annotated[int, Meta(ge=-1, le=1 << 62)]
_U32 = Annotated[int, Meta(ge=0, lt=1 << 32)]
_Epoch = Annotated[int, Meta(ge=0, lt=1 << 31)]
_Id = Annotated[str, Meta(pattern=r"\A[0-9a-f]{32}\Z")]
_Name = Annotated[str, Meta(min_length=1, max_length=255)]
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,200}\Z")


class Kind(IntEnum):
    HELLO = 1
    DATA = 2
    STATE = 3
    IDLE = 4
    DIRECTIVE = 5
    CONFIRM = 6
    """The child shall say (Receipt) when everything of this line that came before is durable."""


class PollRefusal(StrEnum):
    """Why a poll is refused as a whole."""

    POLL_AGAIN = "POLL_AGAIN"
    """The node does not know the poll before; all of it has to be sent."""
    LEVEL = "LEVEL"
    """The node cannot be a child here: its level, or a cycle."""
    IDENTITY = "IDENTITY"
    """The certificate is for another node."""


class Flags(IntFlag):
    CONTINUES = 1
    CHAINED = 2


class Point(NamedTuple):
    """A batch boundary of a log, and the chain over everything before it."""

    offset: _Offset
    chain: _U32


class LogPosition(msgspec.Struct, frozen=True, array_like=True):
    """Where a child stands in a log: it has everything before `offset`, and `skip` bytes of the batch there. `points`
    are places behind which it looks for the end of what both have, after a DIVERGED. `refused`: it got no data before
    and wants to be told when it may go on, also if there is nothing new. `beyond`: the parent, which writes this log,
    said BEHIND; this is the batch that the child has at its end."""

    topic: _Name
    partition: Annotated[int, Meta(ge=0, lt=MAX_PARTITIONS)]
    log_id: _Id
    epoch: _Epoch
    offset: _Offset
    chain: _U32
    skip: Annotated[int, Meta(ge=0, lt=16 << 20)] = 0
    points: Annotated[list[Point], Meta(max_length=128)] = []
    refused: bool = False
    beyond: Annotated[bytes, Meta(max_length=MAX_BEYOND_BYTES)] = b""


class Poll(msgspec.Struct, frozen=True, kw_only=True):
    """The body of POST /v1/pipe. `topics` are patterns; `known` says of which topics the child has the newest
    description (its digest). In `hours` of the parent's day it takes all topics, else urgent ones only. `pin`: nothing
    of these logs that it has not got yet shall be removed for an hour."""

    version: int = VERSION
    uid: _Id
    name: _Name
    level: str
    topics: Annotated[list[_Name], Meta(max_length=1000)]
    logs: Annotated[list[LogPosition], Meta(max_length=MAX_LINES)]
    known: Annotated[dict[_Name, int], Meta(max_length=MAX_LINES)] = {}
    hours: Annotated[str, Meta(max_length=200)] = ""
    pin: bool = False


class SamePoll(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/pipe of a child that has nothing else to say than in its last poll: the CRC-32C of that."""

    uid: _Id
    same: _U32


class DurableLog(msgspec.Struct, frozen=True, array_like=True):
    """A log, up to where a child has it durably."""

    topic: _Name
    partition: Annotated[int, Meta(ge=0, lt=MAX_PARTITIONS)]
    log_id: _Id
    epoch: _Epoch
    durable_end: _Offset


class Receipt(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The body of POST /v1/pipe/durable: what a child has durably of the logs that it was asked about."""

    uid: _Id
    logs: Annotated[list[DurableLog], Meta(max_length=MAX_CONFIRMED)]


class PartitionInfo(msgspec.Struct, frozen=True, array_like=True):
    """The identity of a log, and where it begins at this node."""

    log_id: _Id
    origin: _Id
    epochs: Annotated[list[tuple[_Epoch, _Offset]], Meta(min_length=1)]
    log_start: _Offset
    chain: _U32
    snapshot: tuple[_Place, _Place]


class TopicInfo(msgspec.Struct, frozen=True):
    """A topic as its origin made it. `digest` is another one when something differs that a child has to take over."""

    name: str
    settings: TopicSettings
    partitions: Annotated[list[PartitionInfo], Meta(min_length=1, max_length=MAX_PARTITIONS)]
    digest: int

    def problem(self) -> str:
        """Why this describes no topic that a node may mirror; "" when it does."""
        if not is_shared(self.name):
            return f"{self.name!r} is not the name of a replicated topic"
        if self.settings.partitions != len(self.partitions):
            return f"{self.name} has {self.settings.partitions} partitions, {len(self.partitions)} are described"
        for part in self.partitions:
            if any(one[0] >= other[0] or one[1] > other[1] for one, other in pairwise(part.epochs)):
                return f"the histories of {self.name} do not follow each other"
        return ""


class Patterns:
    """The topics that a node wants: shell wildcards. What belongs to one node alone is matched by none, what the fleet
    has decided by all."""

    def __init__(self, patterns: list[str]) -> None:
        wild = wildcards(patterns)
        self._names = {*patterns}.difference(wild)
        self._match = re.compile("|".join(translate(pattern) for pattern in wild) or r"(?!)").match

    def __contains__(self, topic: str) -> bool:
        wanted = topic in self._names or self._match(topic) is not None or topic == TRUST_TOPIC
        return wanted and is_shared(topic)


def wildcards(patterns: list[str]) -> list[str]:
    """Those that are no names."""
    return [pattern for pattern in patterns if not WILD.isdisjoint(pattern)]


def is_shared(topic: str) -> bool:
    """True for the name of a topic that may leave its node: no dead letters, and of what is internal only __trust."""
    if topic == TRUST_TOPIC:
        return True
    return _TOPIC.match(topic) is not None and not is_own(topic) and topic not in (".", "..")


def describe_topic(name: str, settings: TopicSettings, partitions: list[PartitionInfo]) -> TopicInfo:
    """The description of a topic with its digest. Where a log begins is not part of that: it moves all the time."""
    lasting = [(part.log_id, part.origin, part.epochs, part.snapshot) for part in partitions]
    return TopicInfo(name, settings, partitions, crc32c(msgspec.json.encode((settings, lasting))))


class Hello(msgspec.Struct, frozen=True, kw_only=True):
    """The first frame of every answer, and again when a topic changed. `path` is the way to the top, from this node's
    parent on (node uids); `topics` are those that match and differ from what the child knows."""

    uid: _Id
    name: _Name
    level: str
    path: Annotated[list[_Id], Meta(max_length=32)]
    topics: list[TopicInfo]


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """Why a line gets no data: GONE, DIVERGED, LOG_ID, BEHIND, DAMAGED, NOT_CARRIED (what `offset` means depends on
    it: where the log begins, the last of the points that both have, -, the durable end, the end of the damage), HOURS,
    DELETED (its origin has deleted the log, in the epochs `start` to `offset`);
    or OK: it gets what there is, from now on."""

    code: str
    message: str
    offset: _Place = -1
    chain: _U32 = 0
    log_id: str = ""
    start: _Place = -1
    start_chain: _U32 = 0


class PipeFrame(NamedTuple):
    """The header of a frame."""

    size: int
    kind: int
    flags: int
    line: int
    chain: int
    offset: int
    skip: int
    durable_end: int


class Part(NamedTuple):
    """A frame, or for DATA what has arrived of it: `first` piece of it or not. The payload is valid until the next
    bytes are read."""

    frame: PipeFrame
    payload: memoryview
    first: bool


def write_frame(kind: Kind, payload: bytes = b"", line: int = 0) -> bytes:
    """A frame with JSON or nothing."""
    return HEADER.pack(len(payload), kind, 0, line, 0, 0, 0, 0) + payload


class FrameReader:
    """Bytes in, frames out; DATA piece by piece, everything else whole. After an error it is of no use any more."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._body = bytearray()
        self._frame: PipeFrame | None = None
        self._left = 0

    def feed(self, data: memoryview) -> Iterator[Part]:
        """Raises RemoteProtocolError for what is not a frame."""
        while len(data):
            if self._frame is None:
                data, begun = self._begin(data)
                if begun and not self._left:
                    yield self._whole(memoryview(b""))
                continue
            piece, data = data[: self._left], data[self._left :]
            if self._frame.kind == Kind.DATA:
                first = self._left == self._frame.size
                self._left -= len(piece)
                frame = self._frame
                if not self._left:
                    self._frame = None
                yield Part(frame, piece, first)
                continue
            self._body += piece
            self._left -= len(piece)
            if not self._left:
                yield self._whole(memoryview(bytes(self._body)))

    def _begin(self, data: memoryview) -> tuple[memoryview, bool]:
        missing = HEADER_BYTES - len(self._head)
        self._head += data[:missing]
        begun = len(self._head) == HEADER_BYTES
        if begun:
            frame = PipeFrame._make(HEADER.unpack(self._head))
            self._head.clear()
            if frame.kind not in Kind._value2member_map_:
                raise RemoteProtocolError(f"the parent sent a frame of kind {frame.kind}")
            if frame.kind != Kind.DATA and frame.size > MAX_JSON_BYTES:
                raise RemoteProtocolError(f"the parent announced {frame.size} bytes of JSON")
            self._frame, self._left = frame, frame.size
        return data[missing:], begun

    def _whole(self, payload: memoryview) -> Part:
        assert self._frame is not None
        part = Part(self._frame, payload, True)
        self._frame, self._body = None, bytearray()
        return part
