"""Confirming to the parent what is durable here, where it asked: its publishers wait for it.

    frame CONFIRM -> everything that came before it is durable -> POST /v1/pipe/durable, one at a time

The requests go over a connection of their own, which stays. What was lost with it is confirmed over the next one.
"""

from __future__ import annotations

import msgspec

from edgebroker.common.types import TopicPartition
from edgebroker.network.http.peers import Peers
from edgebroker.pipe.stream import MAX_CONFIRMED, DurableLog, Receipt
from edgebroker.storage.engine import Log, MirrorEngine

RECEIVE_BYTES = 4 << 10
RETRY_SECONDS = 0.5


class Receipts:
    """Owned by the loop thread."""

    def __init__(self, engine: MirrorEngine, peers: Peers, uid: str) -> None:
        self._engine, self._loop, self._uid = engine, peers.loop, uid
        self._client = peers.client(self, RECEIVE_BYTES)
        self._address = ""
        # What the parent waits for, by log; what is durable of that, to be said next; and what is being said.
        self._wanted: dict[TopicPartition, int] = {}
        self._ready: dict[TopicPartition, None] = {}
        self._saying: list[TopicPartition] = []
        self._opening = self._busy = self._stopped = False

    def stop(self) -> None:
        self._stopped = True
        self._client.stop()

    def wanted(self, address: str, key: TopicPartition, offset: int) -> None:
        """The parent at `address` asks to be told when everything before `offset` is durable here."""
        if address != self._address:
            self._address = address
            self._wanted.clear()
            self._ready.clear()
            self._saying.clear()
            self._client.close("the parent is another node")
        self._wanted[key] = offset
        log = self._engine.log(*key)
        if log is not None:
            self.on_durable(log)

    def on_durable(self, log: Log) -> None:
        """A log grew."""
        if not self._wanted:
            return
        key = TopicPartition(log.topic, log.partition)
        if log.durable_end >= self._wanted.get(key, 1 << 62):
            del self._wanted[key]
            self._ready[key] = None
            self._send()

    def _send(self) -> None:
        if self._busy or self._opening or self._stopped or not self._ready:
            return
        if self._client.transport is None:
            self._opening = True
            self._client.open(self._address)
            return
        logs = []
        self._saying = list(self._ready)[:MAX_CONFIRMED]
        for key in self._saying:
            del self._ready[key]
            log = self._engine.log(*key)
            if log is not None:
                logs.append(DurableLog(*key, log.identity.log_id, log.epoch, log.durable_end))
        self._busy = True
        self._client.request("POST", "/v1/pipe/durable", msgspec.json.encode(Receipt(uid=self._uid, logs=logs)))

    # ---- the client's owner ----

    def on_connected(self) -> None:
        self._opening = False
        self._send()

    def on_response(self, status: int, retry_after: float) -> None: ...

    def on_body(self, data: memoryview) -> None: ...

    def on_complete(self) -> None:
        self._busy = False
        self._saying.clear()
        self._send()

    def on_lost(self, reason: str) -> None:
        self._opening = self._busy = False
        self._ready = {**dict.fromkeys(self._saying), **self._ready}
        self._saying.clear()
        if self._ready and not self._stopped:
            self._loop.call_later(RETRY_SECONDS, self._send)
