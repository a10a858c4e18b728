"""Slow, obvious twins of the native core, written from the format and not from the C code.

The tests compare both on the same input. Nothing here is tuned; where a rule has an order (which reason wins), the
order is the one documented in cext/recordbatch.h.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from edgebroker.common.batch import Reason
from edgebroker.common.errors import Code

HEADER = struct.Struct(">qiibIhiqqqhii")
INT64_MIN, INT64_MAX = -(1 << 63), (1 << 63) - 1


class Bad(Exception):
    """Carries the reason why something was refused."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason.name)
        self.reason = reason


# ---- CRC-32C ----


def crc32c_bitwise(data: bytes, value: int = 0) -> int:
    crc = value ^ 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


TABLE = [crc32c_bitwise(bytes([byte]), 0xFFFFFFFF) ^ 0xFFFFFFFF for byte in range(256)]


def crc32c(data: bytes, value: int = 0) -> int:
    crc = value ^ 0xFFFFFFFF
    for byte in data:
        crc = TABLE[(crc ^ byte) & 255] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


# ---- varints ----


def write_varint(value: int) -> bytes:
    raw = value * 2 if value >= 0 else -value * 2 - 1
    out = bytearray()
    while raw > 127:
        out.append(raw % 128 + 128)
        raw //= 128
    return bytes([*out, raw])


def read_varint(data: bytes, position: int, end: int, bits: int = 32) -> tuple[int, int]:
    """(value, position after it); a value of more than `bits` bits or one that is cut off is bad."""
    raw, shift = 0, 0
    while True:
        if position >= end or shift >= bits:
            raise Bad(Reason.BAD_RECORD)
        byte = data[position]
        raw += (byte % 128) << shift
        position, shift = position + 1, shift + 7
        if raw >> bits or (shift > bits and byte > 127):
            raise Bad(Reason.BAD_RECORD)
        if byte < 128:
            return (raw // 2 if raw % 2 == 0 else -(raw // 2) - 1), position


# ---- one record ----


class Plain(NamedTuple):
    timestamp_delta: int
    offset_delta: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes | None], ...]
    size: int


def _blob(data: bytes, position: int, end: int, lowest: int) -> tuple[bytes | None, int]:
    size, position = read_varint(data, position, end)
    if size < lowest or size > end - position:
        raise Bad(Reason.BAD_RECORD)
    return (None, position) if size < 0 else (data[position : position + size], position + size)


def read_record(data: bytes, start: int) -> Plain:
    length, position = read_varint(data, start, len(data))
    end = position + length
    if length < 1 or end > len(data) or data[position] != 0:
        raise Bad(Reason.BAD_RECORD)
    timestamp_delta, position = read_varint(data, position + 1, end, 64)
    offset_delta, position = read_varint(data, position, end)
    key, position = _blob(data, position, end, -1)
    value, position = _blob(data, position, end, -1)
    count, position = read_varint(data, position, end)
    headers = []
    if count < 0:
        raise Bad(Reason.BAD_RECORD)
    for _ in range(count):
        name, position = _blob(data, position, end, 0)
        assert name is not None
        try:
            text = name.decode()
        except UnicodeDecodeError:
            raise Bad(Reason.BAD_RECORD) from None
        content, position = _blob(data, position, end, -1)
        headers.append((text, content))
    if position != end:
        raise Bad(Reason.BAD_RECORD)
    return Plain(timestamp_delta, offset_delta, key, value, tuple(headers), end - start)


# ---- batches ----


class Header(NamedTuple):
    base_offset: int
    length: int
    epoch: int
    magic: int
    crc: int
    attributes: int
    last_delta: int
    base_timestamp: int
    max_timestamp: int
    producer_id: int
    producer_epoch: int
    base_sequence: int
    count: int

    @property
    def size(self) -> int:
        return self.length + 12


def frame(data: bytes, max_batch: int) -> Header:
    if len(data) < 61:
        raise Bad(Reason.ZEROES if data and not any(data) else Reason.TRUNCATED)
    header = Header(*HEADER.unpack(data[:61]))
    if header.length == 0 and header.magic == 0:
        raise Bad(Reason.ZEROES)
    if header.magic != 2:
        raise Bad(Reason.BAD_MAGIC)
    if header.size < 61:
        raise Bad(Reason.BAD_LENGTH)
    if header.size > max_batch:
        raise Bad(Reason.TOO_LARGE)
    if header.size > len(data):
        raise Bad(Reason.TRUNCATED)
    return header


def check_records(body: bytes, header: Header, max_record: int) -> None:
    position, times = 0, []
    for i in range(header.count):
        record = read_record(body, position)
        if record.offset_delta != i:
            raise Bad(Reason.BAD_RECORD)
        if record.size > max_record:
            raise Bad(Reason.TOO_LARGE)
        times.append(header.base_timestamp + record.timestamp_delta)
        if not INT64_MIN <= times[-1] <= INT64_MAX:
            raise Bad(Reason.BAD_TIMESTAMP)
        position += record.size
    if position != len(body):
        raise Bad(Reason.BAD_RECORD)


def check_client_batch(data: bytes, max_batch: int, max_record: int) -> Header:
    header = frame(data, max_batch)
    codec = header.attributes & 7
    if codec not in (0, 1, 3, 4):
        raise Bad(Reason.BAD_CODEC)
    if header.attributes != codec:
        raise Bad(Reason.BAD_ATTRIBUTES)
    if header.count < 1 or header.last_delta != header.count - 1:
        raise Bad(Reason.BAD_COUNT)
    if codec == 0 and header.count * 7 > header.size - 61:
        raise Bad(Reason.BAD_COUNT)
    if header.producer_id >= 0 and min(header.producer_epoch, header.base_sequence) < 0:
        raise Bad(Reason.BAD_PRODUCER)
    if crc32c(data[21 : header.size]) != header.crc:
        raise Bad(Reason.BAD_CRC)
    if codec == 0:
        check_records(data[61 : header.size], header, max_record)
    return header


def client_reason(data: bytes, max_batch: int = 1 << 20, max_record: int = 1 << 20) -> Reason:
    """Why a frame of batches is refused; the first bad batch decides."""
    position = 0
    try:
        while True:
            position += check_client_batch(data[position:], max_batch, max_record).size
            if position == len(data):
                return Reason.OK
    except Bad as bad:
        return bad.reason


def decode(data: bytes, inflate: Callable[[int, bytes], bytes]) -> tuple[list[tuple[object, ...]], int, Reason]:
    """Every record as (offset, timestamp, key, value, headers); how far it was understood, and why no further."""
    found: list[tuple[object, ...]] = []
    position = 0
    try:
        while position < len(data):
            header = frame(data[position:], 1 << 31)
            if crc32c(data[position + 21 : position + header.size]) != header.crc:
                raise Bad(Reason.BAD_CRC)
            body = data[position + 61 : position + header.size]
            if header.attributes & 7:
                body = inflate(header.attributes & 7, body)
            at = 0
            for _ in range(0 if header.attributes & 0x20 else header.count):
                record = read_record(body, at)
                at += record.size
                offset, timestamp = header.base_offset + record.offset_delta, header.base_timestamp
                found.append((offset, timestamp + record.timestamp_delta, *record[2:5]))
            if at != len(body) and not header.attributes & 0x20:
                raise Bad(Reason.BAD_RECORD)
            position += header.size
    except Bad as bad:
        return found, position, bad.reason
    return found, position, Reason.OK


@dataclass
class Scanned:
    next_offset: int
    chain: int
    epoch: int
    good_end: int = 0
    reason: Reason = Reason.OK
    max_timestamp: int = INT64_MIN


def scan(data: bytes, expected: int, chain: int, epoch: int, max_batch: int = 1 << 20) -> Scanned:
    """Walk stored batches; max_batch bounds each."""
    state = Scanned(expected, chain, epoch)
    try:
        while state.good_end < len(data):
            rest = data[state.good_end :]
            header = frame(rest, max_batch)
            if header.count < 1 or header.last_delta != header.count - 1:
                raise Bad(Reason.BAD_COUNT)
            wrong = state.next_offset >= 0 and header.base_offset != state.next_offset
            if wrong or header.base_offset < 0 or header.base_offset + header.count > INT64_MAX:
                raise Bad(Reason.BAD_OFFSET)
            if header.epoch < state.epoch:
                raise Bad(Reason.BAD_EPOCH)
            if crc32c(rest[21 : header.size]) != header.crc:
                raise Bad(Reason.BAD_CRC)
            state.chain = crc32c(rest[:61], state.chain)
            state.next_offset, state.epoch = header.base_offset + header.count, header.epoch
            state.max_timestamp = max(state.max_timestamp, header.max_timestamp)
            state.good_end += header.size
    except Bad as bad:
        state.reason = bad.reason
    return state


def murmur2(key: bytes) -> int:
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = (0x9747B28C ^ len(key)) & mask
    whole = len(key) // 4 * 4
    for (k,) in struct.iter_unpack("<I", key[:whole]):
        k = k * m & mask
        k = (k ^ k >> 24) * m & mask
        h = h * m & mask ^ k
    if key[whole:]:
        h = (h ^ int.from_bytes(key[whole:], "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15


# ---- the staging area ----


@dataclass
class Sent:
    """One batch in the model's log."""

    offset: int
    header: Header
    raw: bytes


@dataclass
class StageModel:
    """Stage as a list of batches: what a producer is allowed follows from the log alone, read again every time."""

    next_offset: int
    epoch: int
    window: int
    log: list[Sent] = field(default_factory=list)

    def recent(self, producer_id: int, below: int = 1 << 62) -> list[Sent]:
        """The batches of a producer's latest epoch below an offset, at most as many as the window holds."""
        found: list[Sent] = []
        for sent in self.log:
            if sent.header.producer_id == producer_id:
                if found and found[-1].header.producer_epoch != sent.header.producer_epoch:
                    found = []
                found.append(sent)
        return [sent for sent in found if sent.offset < below][-self.window :]

    def admit(self, header: Header) -> tuple[Code, int]:
        """(code, offset of the earlier copy or -1)."""
        if header.producer_id < 0:
            return Code.OK, -1
        known = self.recent(header.producer_id)
        if not known or header.producer_epoch > known[-1].header.producer_epoch:
            return (Code.OK if header.base_sequence == 0 else Code.OUT_OF_ORDER), -1
        last = known[-1].header
        if header.producer_epoch < last.producer_epoch:
            return Code.FENCED, -1
        if header.base_sequence == (last.base_sequence + last.count) % (1 << 31):
            return Code.OK, -1
        for sent in known:
            old = sent.header
            if (old.base_sequence, old.count, old.crc) == (header.base_sequence, header.count, header.crc):
                return Code.OK, sent.offset
        return Code.OUT_OF_ORDER, -1

    def append(self, frames: Iterable[bytes]) -> tuple[list[tuple[int, int, int]], int, int]:
        """(answers, wait, new records); a frame is taken whole or not at all."""
        answers, wait, records = [], 0, 0
        for data in frames:
            reason = client_reason(data)
            if reason:
                answers.append((-1, int(reason.code), int(reason)))
                continue
            before, kept, first, needed, position = self.next_offset, len(self.log), -1, 0, 0
            code = Code.OK
            while position < len(data):
                header = frame(data[position:], 1 << 20)
                code, old = self.admit(header)
                if code:
                    self.next_offset, first = before, -1
                    del self.log[kept:]
                    break
                offset = self.next_offset if old < 0 else old
                if old < 0:
                    raw = data[position : position + header.size]
                    self.log.append(Sent(offset, header, restamp(raw, offset, self.epoch)))
                    self.next_offset += header.count
                needed = max(needed, offset + header.count)
                first = offset if first < 0 else first
                position += header.size
            answers.append((first, int(code), 0))
            wait = max(wait, 0 if code else needed)
            records += self.next_offset - before
        return answers, wait, records

    def rollback(self, next_offset: int) -> None:
        self.log = [sent for sent in self.log if sent.offset < next_offset]
        self.next_offset = next_offset

    def undoes_little(self, next_offset: int) -> bool:
        """True when a rollback leaves every producer in the epoch it was in, and no window has dropped a batch."""
        ids = {sent.header.producer_id for sent in self.log if sent.offset >= next_offset} - {-1}
        wide = replace(self, window=len(self.log))
        return all(wide.recent(i)[0].offset < next_offset and len(wide.recent(i)) <= self.window for i in ids)

    def copy(self) -> StageModel:
        return replace(self, log=list(self.log))


def restamp(raw: bytes, offset: int, epoch: int) -> bytes:
    return struct.pack(">q", offset) + raw[8:12] + struct.pack(">i", epoch) + raw[16:]
