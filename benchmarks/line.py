"""A narrow, long line between two nodes, which is cut again and again: a proxy in threads of its own."""

from __future__ import annotations

import random
import socket
import struct
import threading
import time
from collections import deque

BUFFER_BYTES = 32 << 10
PIECE_BYTES = 1 << 10
_RESET = struct.pack("ii", 1, 0)


class Line:
    """Passes connections on to `target` (HOST:PORT) at so many bytes a second downwards, after a delay; cuts each one
    `cut_seconds` after it was made, wherever that is. `seconds` and `delivered` count from a connection's first bytes
    to its end: what share of the line was used."""

    def __init__(self, target: str, rate: float, delay: float, cut_seconds: float, seed: int = 1) -> None:
        self._target, self._rate, self._delay, self._cut = target, rate, delay, cut_seconds
        self._rng = random.Random(seed)
        self._lock = threading.Lock()
        self.delivered = self.cuts = 0
        self.seconds = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        host, _, port = self._target.rpartition(":")
        while True:
            try:
                lower, _ = self._listener.accept()
            except OSError:
                return
            upper = socket.socket()
            # A long line holds little; what the kernels on both sides would take in would be lost with every cut.
            upper.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, BUFFER_BYTES)
            upper.connect((host, int(port)))
            threading.Thread(target=self._up, args=(lower, upper), daemon=True).start()
            threading.Thread(target=self._down, args=(upper, lower), daemon=True).start()

    def _up(self, lower: socket.socket, upper: socket.socket) -> None:
        try:
            while data := lower.recv(1 << 16):
                time.sleep(self._delay)
                upper.sendall(data)
        except OSError:
            pass
        upper.close()

    def _down(self, upper: socket.socket, lower: socket.socket) -> None:
        """Every piece arrives when those before it are through, and after the delay."""
        end = time.monotonic() + self._cut * self._rng.uniform(0.8, 1.2) if self._cut else float("inf")
        on_the_way: deque[tuple[float, bytes]] = deque()
        free = first = 0.0
        upper.settimeout(0.005)
        try:
            while time.monotonic() < end:
                now = time.monotonic()
                if len(on_the_way) * PIECE_BYTES < self._rate * self._delay + BUFFER_BYTES:
                    try:
                        data = upper.recv(PIECE_BYTES)
                        if not data:
                            break
                        free = max(now, free) + len(data) / self._rate
                        on_the_way.append((free + self._delay, data))
                    except TimeoutError:
                        pass
                else:
                    time.sleep(0.005)
                while on_the_way and on_the_way[0][0] <= time.monotonic():
                    data = on_the_way.popleft()[1]
                    lower.sendall(data)
                    first = first or time.monotonic()
                    with self._lock:
                        self.delivered += len(data)
        except OSError:
            pass
        with self._lock:
            self.cuts += 1
            self.seconds += time.monotonic() - first if first else 0.0
        for sock in (lower, upper):
            try:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
            sock.close()

    def close(self) -> None:
        self._listener.close()
