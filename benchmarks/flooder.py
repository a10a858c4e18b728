"""`python -m benchmarks.flooder KIND SERVER ADMIN COUNT`: COUNT connections that send as much of one kind as the node
takes, and read what it answers, until standard input ends. Prints a line when all of them are at it."""

from __future__ import annotations

import selectors
import socket
import sys
from itertools import count

from edgebroker.common.messages import NO_LOG_ID, AckKind, ConsumerAck, Wanted
from edgebroker.common.types import Start
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import NO_RESET, Connect, Intent, Reset, Subscribe

TOPIC = "prices"
PIECE_BYTES = 1 << 20
NEW_PRODUCERS = frames.WANT_PRODUCER | frames.NEW_EPOCH
_names = count()


def main() -> None:
    kind, server, admin, _, number = sys.argv[1:]
    selector = selectors.DefaultSelector()
    for _ in range(int(number)):
        sock = socket.create_connection(_split(admin if kind == "get" else server))
        if kind != "get":
            name = f"flood-{next(_names)}"
            sock.sendall(_connect(name, 0))
            sock.recv(1 << 16)
            data = _frames(kind, name)
        else:
            data = b"GET /v1/node HTTP/1.1\r\nHost: localhost\r\n\r\n"
        sock.setblocking(False)
        both = selectors.EVENT_READ | selectors.EVENT_WRITE
        selector.register(sock, both, [data * (PIECE_BYTES // len(data) + 1), 0])
    selector.register(sys.stdin, selectors.EVENT_READ, None)
    print("flooding", flush=True)
    while True:
        for key, mask in selector.select():
            if key.data is None:
                return
            assert isinstance(key.fileobj, socket.socket)
            try:
                if mask & selectors.EVENT_READ and not key.fileobj.recv(1 << 18):
                    raise ConnectionError
                if mask & selectors.EVENT_WRITE:
                    data, sent = key.data
                    sent += key.fileobj.send(memoryview(data)[sent : sent + (1 << 18)])
                    key.data[1] = sent if sent < len(data) else 0
            except BlockingIOError:
                pass
            except OSError:
                selector.unregister(key.fileobj)
                key.fileobj.close()


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def _connect(name: str, flags: int, topics: int = 0) -> bytes:
    return frames.write_connect(1, Connect(1, flags, name, b"", -1, -1, [f"topic-{rank}" for rank in range(topics)]))


def _frames(kind: str, name: str) -> bytes:
    """What is sent again and again; it is wrong or needless, each time."""
    if kind == "ack":
        return frames.write_consumer_ack(7, ConsumerAck(AckKind.CUMULATIVE, TOPIC, 0, 1, 99, 5))
    if kind == "heartbeat":
        return frames.write_heartbeat([(TOPIC, 0, 5)])
    if kind == "connect":
        return _connect(name, 0)
    if kind == "topics":
        return _connect(name, 0, 1000)
    if kind == "epoch":
        return b"".join(_connect(f"{name}-{rank}", NEW_PRODUCERS) for rank in range(1000))
    if kind == "reset":
        return frames.write_reset(7, Reset(NO_RESET, NO_LOG_ID, TOPIC, 0, 0, 0))
    wanted = [Wanted(TOPIC, -1, Start.LATEST, NO_LOG_ID, 0, 0)]
    return b"".join(
        frames.write_subscribe(7, Subscribe(intent, "flood", 100, 1 << 20, wanted))
        for intent in (Intent.JOIN, Intent.LEAVE)
    )


if __name__ == "__main__":
    main()
