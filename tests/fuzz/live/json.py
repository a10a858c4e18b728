"""JSON bodies, query strings and parts of paths that are nearly right, for every route that there is."""

from __future__ import annotations

import re
from random import Random

from tests.fuzz.live.bodies import ROUTES, WITH_BODY, made, posted, query
from tests.fuzz.live.mutation import mutated, mutated_json, written
from tests.fuzz.live.node import SNAPSHOT, Finding, Node
from tests.fuzz.live.target import Target

# What takes topics away would leave little to ask about.
LASTING = [route for route in ROUTES if route.method != "DELETE" and not route.path.endswith("/rename")]
SEGMENTS = [
    "", ".", "..", "%2e%2e", "%2f", "%00", "%ff%fe", "%", "%zz", "%C3%A9", "%E2%82%AC" * 50, "a" * 300, "*", "t%20",
    "t;x", "-1", "0", "9" * 5000, "__t", "%0d%0ax:y", "%F0%9F%98%80", "{name}", "t.dlq",
]  # fmt: skip


class Json(Target):
    def play(self, node: Node, random: Random) -> None:
        """One request, and its answer."""
        route = random.choice(WITH_BODY if random.random() < 0.8 else ROUTES)
        if route not in LASTING and random.random() < 0.9:
            route = random.choice(LASTING)
        wanted = made(random, route)
        body = written(mutated_json(random, wanted.body)) if wanted.body else b""
        if body and random.random() < 0.1:
            body = mutated(random, body)
        target = wanted.target
        if random.random() < 0.15:
            parts = target.split("/")
            parts[random.randrange(1, len(parts))] = random.choice(SEGMENTS)
            target = "/".join(parts)
        if random.random() < 0.15 or route.path.startswith("/v1/tree/"):
            target += query(random)
        peer = node.connect("http", tcp=random.random() < 0.02)
        peer.send(posted(wanted.method, target, body))
        asked = node.clock.monotonic()
        while b"\r\n\r\n" not in peer.take() and not peer.over:
            if node.clock.monotonic() - asked > 3.0:
                raise Finding(f"{wanted.method} {target} is not answered")
            node.turn(0.01)
        if not peer.received and len(target) < 10_000:
            raise Finding(f"{wanted.method} {target} is not answered, the connection is closed")
        begun = re.search(rb'"id":"([0-9a-f]{32})"', peer.received) if route.path.endswith("/snapshot") else None
        if begun is not None:
            node.names[SNAPSHOT.encode()] = begun[1]
        peer.close()


class JsonBelow(Json):
    """The same, of a node that looks for its parent."""

    settings = {"node.level": "l2", "registry.enabled": False, "pipe.parents": "127.0.0.1:1"}
