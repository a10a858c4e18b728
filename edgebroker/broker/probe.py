"""Is a node there, and does it answer?"""

from __future__ import annotations

from collections.abc import Callable

from edgebroker.network.httpclient import HttpClient
from edgebroker.network.loop import Loop

PROBE_SECONDS = 15.0


class Probe:
    """Is a node there and healthy? Told once."""

    def __init__(self, loop: Loop, address: str, told: Callable[[str, bool], None]) -> None:
        self._address, self._told = address, told
        self._client = HttpClient(loop, self)
        self._healthy: bool | None = None
        self._timer = loop.call_later(PROBE_SECONDS, self._client.stop)
        self._client.open(address)

    def on_connected(self) -> None:
        self._client.request("GET", "/healthz", b"")

    def on_response(self, status: int, retry_after: float) -> None:
        self._healthy = status == 200

    def on_body(self, data: memoryview) -> None:
        pass

    def on_complete(self) -> None:
        self._client.stop()

    def on_lost(self, reason: str) -> None:
        self._timer.cancel()
        self._client.stop()
        told, self._told = self._told, lambda address, healthy: None
        told(self._address, bool(self._healthy))
