"""Bytes for both HTTP servers: requests as other programs write them, and as nobody should."""

from __future__ import annotations

from random import Random

from tests.fuzz.live.bodies import ROUTES, made, query
from tests.fuzz.live.mutation import cut, mutated, written
from tests.fuzz.live.node import Case, Node
from tests.fuzz.live.target import Target

HEADERS = [
    b"host: localhost", b"Host: 127.0.0.1:80", b"host: [::1]", b"host: evil.example", b"host:", b"host: [",
    b"host: a\xff", b"accept: */*", b"connection: keep-alive", b"connection: close", b"expect: 100-continue",
    b"origin: null", b"origin: http://localhost", b"sec-fetch-site: cross-site", b"sec-fetch-site: same-origin",
    b"x: a\r\n b", b"x: a\r\n\tb", b"x:\xe9", b"x: " + b"a" * 9000, b"content-type: text/plain",
    b"content-type: application/json; charset=utf-8", b"content-type: ;", b"upgrade: websocket", b"te: trailers",
    b"trailer: x", b"x : y", b": y", b"x", b"cookie: a=b",
]  # fmt: skip
LINES = [
    b"GET http://localhost/healthz HTTP/1.1", b"OPTIONS * HTTP/1.1", b"CONNECT localhost:80 HTTP/1.1", b"GET /healthz",
    b"HEAD /healthz HTTP/1.1", b"HEAD /v1/node HTTP/1.0", b"get / HTTP/1.1", b"PRI * HTTP/2.0",
    b"\x16\x03\x01\x02\x00", b"GET //healthz// HTTP/1.1", b"GET /healthz?a=%ff&a;b=#x HTTP/1.1", b"TRACE / HTTP/1.1",
    b"GET  / HTTP/1.1",
]  # fmt: skip


class Http(Target):
    def play(self, node: Node, random: Random) -> None:
        """One connection with some requests on it."""
        data = b"".join(_request(random) for _ in range(random.choice((1, 1, 1, 2, 3, 8))))
        if random.random() < 0.45:
            data = mutated(random, data)
        pieces = cut(random, data)
        if random.random() < 0.002:
            pieces.insert(random.randrange(len(pieces) + 1), b"")
        node.send(Case(random.choice(("http", "pipe")), pieces), tcp=random.random() < 0.05)


def _request(random: Random) -> bytes:
    wanted = made(random, random.choice(ROUTES))
    body = written(wanted.body) if wanted.body else b""
    target = wanted.target + (query(random) if random.random() < 0.2 else "")
    line = f"{wanted.method} {target} HTTP/1.{random.choice('1110')}".encode()
    if random.random() < 0.15:
        line = random.choice(LINES)
    headers = [b"host: localhost", b"content-type: application/json"]
    headers += random.choices(HEADERS, k=random.choice((0, 0, 0, 1, 2)))
    framing = random.random()
    if framing < 0.4:
        headers.append(b"transfer-encoding: chunked")
        body = _chunked(random, body)
    elif framing < 0.95:
        headers.append(b"content-length: %d" % max(0, len(body) + random.choice((0, 0, 0, 0, 1, -1))))
    if random.random() < 0.1:
        headers.append(random.choice(headers))
    if random.random() < 0.05:
        headers.append(b"content-length: %d" % random.choice((0, len(body), 70_000, 1 << 64)))
    random.shuffle(headers)
    end = random.choice((b"\r\n", b"\r\n", b"\r\n", b"\n"))
    return random.choice((b"", b"", b"\r\n")) + end.join([line, *headers, b"", b""]) + body


def _chunked(random: Random, body: bytes) -> bytes:
    size = random.choice((1, 7, 100, 1 << 16))
    found = bytearray()
    for first in range(0, len(body), size):
        piece = body[first : first + size]
        found += b"%x%b\r\n%b\r\n" % (len(piece), random.choice((b"", b"", b";a", b';a="b"', b" ")), piece)
    return bytes(found) + b"0\r\n" + random.choice((b"", b"", b"x: y\r\n", b"content-length: 3\r\n")) + b"\r\n"
