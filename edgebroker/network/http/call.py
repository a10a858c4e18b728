"""One request to another node, on a connection of its own."""

from __future__ import annotations

from collections.abc import Callable

from edgebroker.network.http.peers import Peers

SILENCE_SECONDS, LIMIT_SECONDS = 15.0, 60.0
MOST_ERROR_BYTES = 2000
RECEIVE_BYTES = 64 << 10

OnResponse = Callable[[int, bytes, str], None]


class HttpCall:
    """`told(status, body, error)` is called once, on the loop: the error is "" when the answer was 200, else it says
    what went wrong; status 0 when there was no answer at all. It is given up when nothing came for `silence` seconds,
    after `limit` seconds, and when more than `most_bytes` come."""

    def __init__(
        self,
        peers: Peers,
        address: str,
        method: str,
        path: str,
        body: bytes,
        told: OnResponse,
        *,
        most_bytes: int = 1 << 20,
        silence: float = SILENCE_SECONDS,
        limit: float = LIMIT_SECONDS,
    ) -> None:
        loop = self._loop = peers.loop
        self._method, self._path, self._body = method, path, body
        self._told: OnResponse | None = told
        self._most_bytes, self._silence_seconds = most_bytes, silence
        self._data = bytearray()
        self._status = self._through = 0
        self._silence = loop.call_later(silence, self._silent)
        self._limit = loop.call_later(limit, self._late)
        self._client = peers.client(self, RECEIVE_BYTES)
        self._client.open(address)

    # ---- the client's owner ----

    def on_connected(self) -> None:
        self._client.request(self._method, self._path, self._body)

    def on_response(self, status: int, retry_after: float) -> None:
        self._status = status

    def on_body(self, data: memoryview) -> None:
        self._silence.cancel()
        self._silence = self._loop.call_later(self._silence_seconds, self._silent)
        self._data += data
        if len(self._data) > self._most_bytes:
            self._end("more came than was asked for")

    def on_complete(self) -> None:
        if self._status == 200:
            self._end("")
        else:
            text = bytes(self._data[:MOST_ERROR_BYTES]).decode(errors="replace").strip()
            self._end(f"it answered {self._status}: {text}")

    def on_lost(self, reason: str) -> None:
        self._end(reason)

    def _silent(self) -> None:
        transport = self._client.transport
        through = transport.bytes_out - transport.unacknowledged if transport is not None else 0
        pending = transport is not None and bool(transport.backlog or transport.unacknowledged)
        if through > self._through and (pending or self._through):  # the request is still going up, slowly
            self._through = through
            self._silence = self._loop.call_later(self._silence_seconds, self._silent)
        else:
            self._end("it does not go on with its answer")

    def _late(self) -> None:
        self._end("it takes too long")

    def stop(self) -> None:
        """Give up; nothing is told."""
        self._told = None
        self._end("")

    def _end(self, error: str) -> None:
        told, self._told = self._told, None
        data, self._data, self._body = bytes(self._data), bytearray(), b""
        self._silence.cancel()
        self._limit.cancel()
        self._client.stop()  # which says that the connection is lost
        if told is not None:
            told(self._status, data, error)
