"""What operators and a price feed do to a fleet (fleet.py) while faults happen: a table with snapshots, and resyncs.

with Operators(fleet, seed=1) as operators:
    ...                 # faults; operators.tend() now and then
    operators.rest(60.0)
    operators.check()   # every node has exactly the live keys; every resync was answered, or is still known
"""

from __future__ import annotations

import random
import secrets
import threading
from types import TracebackType

from edgebroker.cli.admin_client import call
from edgebroker.cli.main import main
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.errors import EdgeBrokerError
from tests.kit.waiting import wait_for

from .fleet import MIRRORS, Fleet
from .traffic import CLOCK

TABLE = "shelf-prices"
KEYS = 60
CHANGE_SECONDS, SNAPSHOT_SECONDS, RESYNC_SECONDS = 0.05, 9.0, 7.0
LASTS_SECONDS = 600.0


class Operators:
    """A context manager. One thread changes the table; resyncs and snapshots are ordered by tend()."""

    def __init__(self, fleet: Fleet, *, seed: int) -> None:
        self._fleet, self._rng = fleet, random.Random(seed)
        self.live: dict[bytes, bytes | None] = {}
        self.ordered: dict[str, str] = {}
        self.snapshots = 0
        self._over = threading.Event()
        self._resynced_at = self._written_at = CLOCK.monotonic()
        call(fleet["root"].admin, "POST", "/v1/topics", {"name": TABLE, "kind": "table", "segment_bytes": 64 << 10})
        self._thread = threading.Thread(target=self._change, args=(random.Random(seed + 1),), daemon=True)
        self._thread.start()

    def _change(self, rng: random.Random) -> None:
        """A value of one key after the other, each until it is acknowledged."""
        number = 0
        with Producer(self._fleet["root"].server, client_id="price-feed", timeout=None) as producer:
            while not self._over.wait(CHANGE_SECONDS):
                key = b"key-%d" % rng.randrange(KEYS)
                value = None if rng.random() < 0.15 else b"%d" % number + b"." * 300
                number += 1
                sent = producer.send(TABLE, value, key, partition=0)
                while not self._over.is_set():
                    try:
                        sent.result(1.0)
                    except TimeoutError:
                        continue
                    self.live[key] = value
                    break
                else:
                    self.live.pop(key, None)
                    self._unknown = key

    _unknown = b""
    """The key whose last change was under way when it was over: it has one value or the other."""

    def tend(self) -> None:
        """Now and then a resync at some node, or a snapshot of the table."""
        now = CLOCK.monotonic()
        if now - self._resynced_at > RESYNC_SECONDS:
            self._resynced_at = now
            self._resync(self._rng.choice(MIRRORS))
        if now - self._written_at > SNAPSHOT_SECONDS and self._fleet["root"].alive and not self._fleet["root"].frozen:
            self._written_at = now
            threading.Thread(target=self._snapshot, daemon=True).start()

    def _resync(self, name: str) -> None:
        root = self._fleet["root"]
        if not root.alive or root.frozen:
            return
        try:
            nodes = {node["name"]: node["uid"] for node in call(root.admin, "GET", "/v1/tree/nodes")["nodes"]}
            if name not in nodes:
                return
            resync_id = secrets.token_hex(16)
            body = {"type": "resync", "id": resync_id, "uid": nodes[name], "topic": TABLE, "seconds": LASTS_SECONDS}
            call(root.admin, "POST", "/v1/resyncs", body)
            self.ordered[resync_id] = name
        except EdgeBrokerError:
            pass  # it was killed just now

    def _snapshot(self) -> None:
        root = self._fleet["root"]
        arguments = ["publish", TABLE, "--snapshot", "--quiet", "--server", root.server, "--admin", root.admin]
        try:
            self.snapshots += main(arguments) == 0
        except SystemExit:
            pass

    def rest(self, seconds: float) -> None:
        """Nothing is changed any more, and all nodes have the table."""
        self._over.set()
        self._thread.join(seconds)
        self._fleet.settle(TABLE, seconds)
        wait_for(lambda: not self._unanswered(), "every resync is answered", seconds)

    def _unanswered(self) -> list[str]:
        pending = {one["id"] for one in call(self._fleet["root"].admin, "GET", "/v1/resyncs")["pending"]}
        return [resync_id for resync_id in self.ordered if resync_id in pending]

    def check(self) -> None:
        for name, node in self._fleet.nodes.items():
            end = node.partitions(TABLE)[0]["durable_end"]
            seen: dict[bytes, bytes] = {}
            with Consumer(node.server, [TABLE], start="earliest", timeout=20.0) as consumer:
                while max(consumer.next_offsets().values(), default=0) < end:
                    for record in consumer.poll(0.1):
                        assert record.key is not None
                        seen.pop(record.key, None)
                        if record.value is not None:
                            seen[record.key] = record.value
                        consumer.ack(record)
            wanted = {key: value for key, value in self.live.items() if value is not None}
            for key in {*seen, *wanted} - {self._unknown}:
                here, there = seen.get(key), wanted.get(key)
                assert here == there, f"{name}: {key!r} is {here!r}, not {there!r}"

    def __enter__(self) -> Operators:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
