"""What children send their parent: polls that follow a log, and ask for ranges and digests of it, nearly right."""

from __future__ import annotations

from random import Random
from typing import Any

from edgebroker.common.errors import RemoteProtocolError
from edgebroker.network.http.client import ChunkReader
from edgebroker.pipe.stream import FrameReader
from tests.fuzz.live.bodies import CHILD, FOR_NODES, OTHER, made, posted
from tests.fuzz.live.mutation import Pairs, mutated_json, written
from tests.fuzz.live.node import LOG, TABLE, Finding, Node
from tests.fuzz.live.target import Target

CHILDREN = [route for route in FOR_NODES if route.method == "POST"]


class Pipe(Target):
    def play(self, node: Node, random: Random) -> None:
        """One request of a child; an answer that is a stream has to be one of frames."""
        if random.random() < 0.6:
            path, body = _followed(node, random)
        else:
            wanted = made(random, random.choice(CHILDREN))
            path, body = wanted.target, wanted.body or Pairs()
        data = written(mutated_json(random, body))
        peer = node.connect(random.choice(("pipe", "pipe", "http")), tcp=random.random() < 0.05)
        peer.send(posted("POST", path, data))
        for _ in range(random.choice((0, 0, 0, 1, 3))):
            node.turn(0.001)
            peer.send(
                random.choice((b"\r\n", b"\r\n", b"\r\n", b"\n\r\n" * 50, b"GET / HTTP/1.1\r\n\r\n", b"x" * 20_000))
            )
        if random.random() < 0.002:
            peer.send(b"")
        head_end, _, stream = bytes(peer.take()).partition(b"\r\n\r\n")
        if path == "/v1/pipe" and b"octet-stream" in head_end:
            _check(stream)
        peer.close()


def _check(stream: bytes) -> None:
    reader = FrameReader()

    def take(piece: memoryview) -> None:
        for _ in reader.feed(piece):
            pass

    try:
        ChunkReader().feed(memoryview(stream), take)
    except RemoteProtocolError as error:
        raise Finding(f"the answer to a poll is no stream of frames: {error}") from error


def _followed(node: Node, random: Random) -> tuple[str, Any]:
    """What a child asks that knows the logs: where they have batches, and what the chain is there."""
    known = random.choice([*node.points, *node.points, (0, 0), (5, 0), (1 << 40, 7)])
    line: list[Any] = ["t", 0, LOG, random.choice((0, 1, 1, 2)), *known]
    match random.randrange(6):
        case 0:
            first = random.choice((0, 5, 14))
            asked = [
                ("topic", "t"),
                ("partition", 0),
                ("log_id", LOG),
                ("first", first),
                ("next", random.choice((first + 1, 15))),
            ]
            return random.choice(("/v1/pipe/range", "/v1/pipe/digest")), Pairs(asked)
        case 1:
            return "/v1/pipe/durable", Pairs([("uid", CHILD), ("logs", [[*line[:4], random.choice((0, 5, 15, 99))]])])
        case 2:
            line += [random.choice((0, 0, 10, 61, 5000)), [[5, 0], [10, 1]], random.random() < 0.5, "AAAA"]
    lines = [line, ["table", 0, TABLE, 1, 0, 0], ["missing", 0, OTHER, 1, 0, 0]][: random.choice((1, 2, 3))]
    found: list[tuple[Any, Any]] = [("uid", random.choice((CHILD, OTHER))), ("name", "child"), ("level", "l2")]
    found += [("topics", random.choice((["*"], ["t"], ["t*", "[a-", "?" * 30]))), ("logs", lines)]
    found += [("known", Pairs([("t", 1)]))] if random.random() < 0.3 else []
    found += [("hours", "01:00-02:00")] if random.random() < 0.1 else []
    return "/v1/pipe", Pairs([*found, ("pin", random.random() < 0.2)])
