"""Bytes and JSON that are nearly right."""

from __future__ import annotations

import json
from random import Random
from typing import Any

TOKENS = [
    b"\r\n", b"\n", b"\r", b" ", b"\t", b":", b",", b"\0", b"\x0b", b"\xff", b"\r\n\r\n", b"\n\n", b"\r\n ", b"%00",
    b"%ff", b"..", b"//", b"?", b"#", b"*", b"0\r\n\r\n", b"1\r\na\r\n", b"ffffffffffffffff\r\n", b"5;a=b\r\n",
    b"-1\r\n", b"0x5\r\n", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"GET / HTTP/1.1\r\n\r\n", b"content-length: 5\r\n",
    b"content-length: +5\r\n", b"content-length: 5, 5\r\n", b"content-length: 99999999999999999999\r\n",
    b"transfer-encoding: chunked\r\n", b"transfer-encoding: identity\r\n", b"transfer-encoding: gzip, chunked\r\n",
    b"expect: 100-continue\r\n", b"connection: close\r\n", b"connection: upgrade\r\nupgrade: h2c\r\n", b"host: a\r\n",
    b"origin: null\r\n", b"x: y\r\n", b'"', b"[", b"]", b"{", b"}", b"\\u0000", b"\\ud800", b"1e999", b"null", b"true",
    bytes(8), b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"\x80" + bytes(7), bytes(4), b"\xff" * 4, b"\x7f\xff\xff\xff",
]  # fmt: skip


class Verbatim(bytes):
    """JSON as it shall be written, or what is none."""


class Pairs(list[tuple[Any, Any]]):
    """An object: its keys may come twice."""


ODD: list[Any] = [
    None, True, False, 0, -1, 1, 0.5, 1 << 31, 1 << 32, 1 << 53, (1 << 62) + 1, 1 << 63, 1 << 64, -(1 << 63) - 1,
    Verbatim(b"1e400"), Verbatim(b"-1e400"), Verbatim(b"1E-999999999"), Verbatim(b"-0"), Verbatim(b"9" * 5000),
    Verbatim(b"NaN"), Verbatim(b"Infinity"), Verbatim(b"nul"), Verbatim(b""), Verbatim(b'"\xff\xfe"'),
    Verbatim(b'"\0"'), Verbatim(b'"\\ud800"'), Verbatim(b'"\\udc00\\ud800"'), Verbatim(b"[" * 5000 + b"]" * 5000),
    Verbatim(b"[" * 60_000), Verbatim(b'{"a":' * 3000 + b"1" + b"}" * 3000), "", " ", "\0", "\n", "\x1b[2J", "\u202e",
    "e\u0301", "\U0001f600", "a" * 256, "a" * 50_000, "\u20ac" * 300, ".", "..", "/", "../../etc", "*", "*" * 200,
    "[" * 100, "{}%s%n", "__t", "t.dlq", "t", "g", "0", "-1", "@-1", "@" + "9" * 18, "9" * 4400, "\u0661", "earliest",
    "00:00-24:00", "25:00-26:00", "127.0.0.1:1", "[::1]:1", "x:99999", "\udcff", Verbatim(b"[]"), Verbatim(b"[[]]"),
    Verbatim(b"{}"), Verbatim(b'{"a":1,"a":2}'), Verbatim(b"[" + b"7," * 3000 + b"7]"),
    Verbatim(b"[" + b"null," * 300 + b"null]"), Verbatim(b'["",' * 1000 + b"1]"),
]  # fmt: skip


def written(value: Any) -> bytes:
    """A value as JSON."""
    if isinstance(value, Verbatim):
        return bytes(value)
    if isinstance(value, Pairs):
        return b"{" + b",".join(b"%b:%b" % (written(key), written(one)) for key, one in value) + b"}"
    if isinstance(value, list):
        return b"[" + b",".join(map(written, value)) + b"]"
    return json.dumps(value).encode()


def _places(value: Any) -> list[tuple[list[Any], int]]:
    """Where every part of a value stands: in which list, and at what place of it."""
    found: list[tuple[list[Any], int]] = []
    if isinstance(value, list):
        for rank, one in enumerate(value):
            found.append((value, rank))
            found += _places(one[1] if isinstance(value, Pairs) else one)
    return found


def mutated_json(random: Random, value: Any) -> Any:
    """The value with some of its parts replaced, lost, doubled or moved; it is changed in place."""
    box = [value]
    for _ in range(random.choice((0, 0, 1, 1, 1, 2, 4))):
        places = _places(box)
        inside, rank = random.choice(places)
        where, other = random.choice(places)
        in_object = isinstance(inside, Pairs)
        match random.randrange(6):
            case 0 | 1:
                odd = random.choice(ODD)
                inside[rank] = (inside[rank][0], odd) if in_object else odd
            case 2 if inside is not box:
                del inside[rank]
            case 3:
                inside.append(inside[rank])
            case 4 if in_object:
                key = random.choice(("x", "", "\0", "a" * 300, inside[other % len(inside)][0]))
                inside[rank] = (key, inside[rank][1])
            case _:
                taken = written(where[other][1] if isinstance(where, Pairs) else where[other])
                moved = Verbatim(taken)  # not the list itself: it could contain itself then
                inside[rank] = (inside[rank][0], moved) if in_object else moved
        if len(box) > 1:
            box = [box]
    return box[0]


def mutated(random: Random, data: bytes) -> bytes:
    """The bytes with some of them changed, lost, doubled, or others between them."""
    changed = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 3, 8))):
        at = random.randrange(len(changed) + 1)
        until = min(len(changed), at + random.choice((1, 1, 2, 4, 16, 200)))
        match random.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << random.randrange(8)
            case 1:
                changed[at:until] = random.choice(TOKENS)
            case 2:
                del changed[at:until]
            case 3:
                changed[at:at] = changed[at:until] * random.choice((1, 1, 2, 50))
            case 4:
                changed[at:until] = random.randbytes(until - at)
            case _:
                changed[at:at] = random.choice(TOKENS)
    return bytes(changed)


def cut(random: Random, data: bytes) -> list[bytes]:
    """The bytes in pieces: one, some, or each byte for itself."""
    if len(data) < 2 or random.random() < 0.4:
        return [data] if data else []
    if len(data) < 600 and random.random() < 0.1:
        return [data[at : at + 1] for at in range(len(data))]
    ends = sorted({random.randrange(1, len(data)) for _ in range(random.choice((1, 1, 2, 5)))})
    return [data[first:last] for first, last in zip([0, *ends], [*ends, len(data)], strict=True)]
