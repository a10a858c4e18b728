"""A TCP proxy that cuts: a connection ends, in the middle of a frame, after so many bytes, or when it is told to.

with Proxy(broker.server, seed=1) as proxy:
    Consumer(proxy.server, ...)
"""

import random
import socket
import struct
import threading
from collections.abc import Sequence
from types import TracebackType

_RESET = struct.pack("ii", 1, 0)


class Proxy:
    """Passes connections on to `target` (HOST:PORT). `budget`: between how many bytes a connection is cut; () never."""

    def __init__(self, target: str, *, seed: int, budget: Sequence[int] = ()) -> None:
        self._target, self._rng = target, random.Random(seed)
        self.budget = budget
        self.cuts = 0
        self._lock = threading.Lock()
        self._pairs: dict[tuple[socket.socket, socket.socket], int] = {}
        self._closed = False
        self._listener = socket.create_server(("127.0.0.1", 0))
        host, port = self._listener.getsockname()
        self.server = f"{host}:{port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        host, _, port = self._target.rpartition(":")
        while not self._closed:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            try:
                broker = socket.create_connection((host, int(port)), 5.0)
            except OSError:
                client.close()
                continue
            for sock in (client, broker):
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._pairs[client, broker] = self._rng.randint(*self.budget) if self.budget else 1 << 62
            for source, sink in ((client, broker), (broker, client)):
                threading.Thread(target=self._pass_on, args=((client, broker), source, sink), daemon=True).start()

    def _pass_on(self, pair: tuple[socket.socket, socket.socket], source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(1 << 16):
                with self._lock:
                    left = self._pairs.get(pair, 0)
                    self._pairs[pair] = left - len(data)
                sink.sendall(data[:left])
                if len(data) >= left:
                    self._cut(pair)
                    return
        except OSError:
            pass
        self._end(pair, reset=False)

    def _cut(self, pair: tuple[socket.socket, socket.socket]) -> None:
        with self._lock:
            self.cuts += 1
            reset = self._rng.random() < 0.5
        self._end(pair, reset=reset)

    def _end(self, pair: tuple[socket.socket, socket.socket], *, reset: bool) -> None:
        with self._lock:
            self._pairs.pop(pair, None)
        for sock in pair:
            try:
                if reset:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()

    def cut_all(self) -> None:
        """End every connection now."""
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._cut(pair)

    def calm(self) -> None:
        """Cut nothing more."""
        with self._lock:
            self.budget = ()
            self._pairs.update(dict.fromkeys(self._pairs, 1 << 62))

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            self._end(pair, reset=False)
