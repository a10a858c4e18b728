"""A parent that says nearly the right things: to polls, reports and questions of a node that mirrors from it."""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from random import Random
from typing import Any

from edgebroker.common import records
from edgebroker.common.crc32c import crc32c
from edgebroker.pipe.report import Directive
from edgebroker.pipe.stream import HEADER, Flags, Kind, TopicInfo
from tests.fuzz.live.bodies import ADDRESS, OTHER, ROUTES, made, posted, sample, type_info
from tests.fuzz.live.mutation import Pairs, Verbatim, cut, mutated, mutated_json, written
from tests.fuzz.live.node import NODE, SECONDS, Case, Finding, Node
from tests.fuzz.live.target import Target
from tests.kit.brokers import numbered

PARENT = "d0" * 16
TOPICS = {f"mirrored-{rank}": [f"d{rank + 1}" * 16, f"e{rank + 1}" * 16] for rank in range(4)}
LOGS = [log_id for logs in TOPICS.values() for log_id in logs]
CODES = ["GONE", "GONE", "DIVERGED", "DIVERGED", "DIVERGED", "BEHIND", "BEHIND", "DAMAGED", "HOURS", "OK"]
RARE_CODES = ["LOG_ID", "NOT_CARRIED", "DELETED", "ELSE"]
# A node that is promoted has no parent.
ASKED = [route for route in ROUTES if route.path != "/v1/promote"]
BATCHES = [records.restamp(numbered(5 * rank, 5, 30), 5 * rank, 1) for rank in range(40)]
HEADS = [
    b"HTTP/1.1 409 Conflict\r\ncontent-length: 2\r\n\r\n{}",
    b"HTTP/1.1 503 x\r\nretry-after: 1\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 503 x\r\nretry-after: 99999999999999999999\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 200 OK\r\n\r\n<html>", b"HTTP/1.1 100 Continue\r\n\r\n", b"SSH-2.0-x\r\n", b"", b"\0" * 40_000,
    b"HTTP/1.1 302 Found\r\nlocation: http://portal/\r\ncontent-length: 0\r\n\r\n",
    b"HTTP/1.1 101 Switching Protocols\r\nupgrade: x\r\n\r\n", b"HTTP/1.1 204 No Content\r\n\r\n",
    b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\ncontent-length: 5\r\n\r\n5\r\nhello\r\n0\r\n\r\n",
]  # fmt: skip


class Parent(Target):
    """An execution is one answer to the node."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.setblocking(False)
        address = f"127.0.0.1:{self._listening.getsockname()[1]}"
        self._address = address.encode()
        self.settings = {
            "node.level": "l2",
            "registry.enabled": False,
            "pipe.parents": address,
            "pipe.registry": address,
        }
        self._connections: dict[socket.socket, bytearray] = {}
        self._case = Case("parent", [])
        self._polled: dict[str, Any] = {}

    def close(self) -> None:
        for one in [self._listening, *self._connections]:
            one.close()

    def play(self, node: Node, random: Random) -> None:
        """Answer one request; now and then somebody asks the node."""
        if not any(case is self._case for case in node.cases):
            node.cases.append(self._case)
        node.names[ADDRESS.encode()] = self._address
        if random.random() < 0.05:
            wanted = made(random, random.choice(ASKED))
            node.send(
                Case("http", [posted(wanted.method, wanted.target, written(wanted.body) if wanted.body else b"")])
            )
        connection, path, body = self._asked(node)
        answer = self._answer(random, path, body)
        self._case.pieces.append(answer)
        waits = not answer.endswith(b"0\r\n\r\n")  # the node does, for the rest
        ended = random.random() < (0.95 if waits else 0.05)
        self._send(node, connection, cut(random, answer), ended=ended)

    def replay(self, node: Node, cases: Sequence[Case]) -> None:
        node.names[ADDRESS.encode()] = self._address
        for case in cases:
            if case.door != "parent":
                node.send(case)
                continue
            for piece in case.pieces:
                connection, _, _ = self._asked(node)
                self._send(node, connection, [piece], ended=False)
        for _ in range(20):
            node.turn(0.01)

    # ---- carrying ----

    def _asked(self, node: Node) -> tuple[socket.socket, str, bytes]:
        """The next request: it comes at the latest when the node has lost all patience."""
        until, attempt = time.monotonic() + SECONDS, 0
        while attempt < 400 or time.monotonic() < until:
            node.turn(0.001 if attempt > 2 else 0.0)
            self._accept()
            for connection, data in list(self._connections.items()):
                found = self._read(connection, data)
                if found is not None:
                    return connection, *found
            node.clock.ahead += 0.3 if attempt < 400 else 0.0  # then it is the disk that is waited for
            attempt += 1
        raise Finding("the node asks its parent for nothing any more")

    def _accept(self) -> None:
        try:
            connection, _ = self._listening.accept()
        except BlockingIOError:
            return
        connection.setblocking(False)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._connections[connection] = bytearray()

    def _read(self, connection: socket.socket, data: bytearray) -> tuple[str, bytes] | None:
        try:
            piece = connection.recv(1 << 18)
            data += piece
            if not piece:
                self._drop(connection)
        except BlockingIOError:
            pass
        except OSError:
            self._drop(connection)
        head, end, body = bytes(data).lstrip(b"\r\n").partition(b"\r\n\r\n")
        size = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0] or 0)
        if connection not in self._connections or not end or len(body) < size:
            return None
        data[:] = body[size:]
        return head.split()[1].decode(), body[:size]

    def _drop(self, connection: socket.socket) -> None:
        connection.close()
        self._connections.pop(connection, None)

    def _send(self, node: Node, connection: socket.socket, pieces: list[bytes], *, ended: bool) -> None:
        for piece in pieces:
            for placeholder, name in node.names.items():
                piece = piece.replace(placeholder, name)
            try:
                connection.sendall(piece)
            except OSError:
                ended = True
            node.settle()
        if ended or not any(pieces):
            self._drop(connection)

    # ---- answering ----

    def _answer(self, random: Random, path: str, body: bytes) -> bytes:
        if random.random() < 0.03:
            return random.choice(HEADS)
        if path == "/v1/pipe":
            content, kind = self._stream(random, body), b"application/octet-stream"
        elif path == "/v1/pipe/range":
            content, kind = b"".join(random.choices(BATCHES[:4], k=2)), b"application/octet-stream"
            content = mutated(random, content) if random.random() < 0.7 else content
        else:
            content, kind = self._json(random, path), b"application/json"
        head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n" % kind
        if random.random() < 0.1:
            return mutated(random, head + b"content-length: %d\r\n\r\n%b" % (len(content), content))
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in cut(random, content))
        chunks = mutated(random, chunks) if random.random() < 0.05 else chunks
        return head + b"transfer-encoding: chunked\r\n\r\n" + chunks + random.choice((b"0\r\n\r\n", b"0\r\n\r\n", b""))

    def _json(self, random: Random, path: str) -> bytes:
        parts = path.partition("?")[0].split("/")
        kinds = [
            route.response for route in ROUTES if route.response is not None and _fits(route.path.split("/"), parts)
        ]
        value = sample(random, type_info(random.choice(kinds))) if kinds else Pairs()
        if parts[-1] in TOPICS:
            logs = [Pairs([("log_id", one), ("log_start", 0), ("durable_end", 200)]) for one in TOPICS[parts[-1]]]
            value = Pairs([("partitions", logs)])
        return written(mutated_json(random, value) if random.random() < 0.7 else value)

    def _stream(self, random: Random, body: bytes) -> bytes:
        poll = json.loads(body)
        self._polled = poll = self._polled if "same" in poll else poll
        frames = [self._hello(random)]
        for line, position in enumerate(poll.get("logs", [])):
            frames += self._line(random, line, position)
        if random.random() < 0.1:
            orders = [sample(random, type_info(Directive)) for _ in range(random.choice((1, 1, 3)))]
            for order in orders:
                order[:] = [(key, NODE if key == "uid" and random.random() < 0.8 else one) for key, one in order]
            frames.append(_frame(random, Kind.DIRECTIVE, orders))
        if random.random() < 0.3:
            rank = random.randrange(len(frames))
            match random.randrange(4):
                case 0:
                    frames[rank] = mutated(random, frames[rank])
                case 1:
                    frames.insert(rank, random.choice(frames))
                case 2:
                    random.shuffle(frames)
                case _:
                    head = list(HEADER.unpack_from(frames[rank]))
                    head[random.randrange(8)] = random.choice((0, 1, 2, 7, 255))
                    frames[rank] = HEADER.pack(*head) + frames[rank][HEADER.size :]
        return b"".join(frames)

    def _hello(self, random: Random) -> bytes:
        topics = [_topic(random, name, logs) for name, logs in TOPICS.items() if random.random() < 0.5]
        if random.random() < 0.05:
            topics.append(sample(random, type_info(TopicInfo)))
        fields = [("uid", PARENT), ("name", "parent"), ("level", "root"), ("path", []), ("topics", topics)]
        return _frame(random, Kind.HELLO, Pairs(fields))

    def _line(self, random: Random, line: int, position: list[Any]) -> Iterator[bytes]:
        _, _, log_id, _, offset, chain, skip, *_ = position
        known = log_id in LOGS and offset % 5 == 0 and offset < 200 and chain == _chain(log_id, offset // 5)
        if random.random() < (0.15 if known else 0.95):
            fields = [
                ("code", random.choice(CODES if random.random() < 0.95 else RARE_CODES)),
                ("message", "no"),
                ("offset", random.choice((-1, 0, 5, offset, offset + 5))),
            ]
            fields += [("chain", _chain(log_id, offset // 5)), ("log_id", random.choice((log_id, OTHER)))]
            fields += [("start", random.choice((-1, 0, 1))), ("start_chain", _chain(log_id, 0))]
            yield _frame(random, Kind.STATE, Pairs(fields), line)
            return
        rank = offset // 5
        flags = Flags.CHAINED if random.random() < 0.8 else 0
        payload = b"".join(BATCHES[rank : rank + random.choice((1, 1, 2, 5))])[skip:]
        if random.random() < 0.1:
            payload = mutated(random, payload)
        head = (line, _chain(log_id, rank), offset, skip, 200)
        size = random.randrange(len(payload) + 1) if random.random() < 0.3 else len(payload)
        yield HEADER.pack(size, Kind.DATA, flags, *head) + payload[:size]
        if size < len(payload) and random.random() < 0.8:
            yield HEADER.pack(len(payload) - size, Kind.DATA, Flags.CONTINUES, *head) + payload[size:]
        if random.random() < 0.2:
            yield _frame(random, random.choice((Kind.CONFIRM, Kind.IDLE)), Verbatim(b""), line)


def _fits(names: list[str], parts: list[str]) -> bool:
    """Is this a path of the route?"""
    alike = all(name[:1] == "{" or name == part for name, part in zip(names, parts, strict=False))
    return alike and len(names) == len(parts)


def _topic(random: Random, name: str, logs: list[str]) -> Pairs:
    """A description of a topic, now and then another one than before."""
    parts: list[list[Any]] = [[log_id, PARENT, [[1, 0]], 0, _chain(log_id, 0), [-1, -1]] for log_id in logs]
    settings = Pairs([("partitions", len(logs))])
    if random.random() < 0.2:
        settings.append(random.choice((("urgent", True), ("retention_ms", 1), ("kind", "table"))))
        parts[0][2] = random.choice(([[1, 0], [2, 10]], [[1, 0], [3, 5], [4, 5]]))
        parts[1][5] = [0, random.choice((5, 10))]
    digest = crc32c(written([settings, parts]))
    return Pairs([("name", name), ("settings", settings), ("partitions", parts), ("digest", digest)])


def _frame(random: Random, kind: Kind, value: Any, line: int = 0) -> bytes:
    """A frame with JSON, now and then nearly right."""
    payload = written(mutated_json(random, value) if random.random() < 0.1 else value)
    return HEADER.pack(len(payload), kind, 0, line, 0, 0, 0, 0) + payload


def _chain(log_id: str, rank: int) -> int:
    """The chain of the parent's logs before a batch."""
    return records.chain(b"".join(BATCHES[:rank]), crc32c(bytes.fromhex(log_id)))
