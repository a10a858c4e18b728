"""`python -m tests.attack.attacker KIND SERVER ADMIN PIPE COUNT`: a stranger in a process of its own.

It prints a line when it is at it, goes on until standard input ends, and prints what it got.

Each kind is a function here.
"""

from __future__ import annotations

import json
import selectors
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import count as count_from
from typing import NamedTuple

from edgebroker.common.messages import NO_LOG_ID, Wanted
from edgebroker.common.types import AckLevel, Start
from edgebroker.network.wire import frames
from edgebroker.network.wire.frames import Connect, Intent, Subscribe

Address = tuple[str, int]
TOPIC = "prices"
UNFINISHED_BYTES = 4 << 20


class Doors(NamedTuple):
    """Where the node is reached: by clients, by operators, by the nodes below."""

    server: Address
    admin: Address
    pipe: Address


_names = count_from()


def main() -> None:
    kind, server, admin, pipe, count = sys.argv[1:]
    found = KINDS[kind](Doors(_split(server), _split(admin), _split(pipe)), int(count))
    print(json.dumps(found), flush=True)


def at_it() -> None:
    print("attacking", flush=True)


def told_to_stop(seconds: float = 0.0) -> bool:
    """Has standard input ended, or does it within so many seconds?"""
    with selectors.DefaultSelector() as selector:
        selector.register(sys.stdin, selectors.EVENT_READ)
        return bool(selector.select(seconds))


def _split(address: str) -> Address:
    host, _, port = address.rpartition(":")
    return host, int(port)


def opened(address: Address, count: int, *, connect: bool = False) -> list[socket.socket]:
    """As many connections as can be had, non-blocking; with `connect` as clients."""
    found = []
    for _ in range(count):
        with suppress(OSError):
            found.append(socket.create_connection(address, 5.0))
            if connect:
                found[-1].sendall(connect_frame(f"slow-{next(_names)}"))
                found[-1].recv(1 << 16)
            found[-1].setblocking(False)
    return found


def connect_frame(name: str, flags: int = 0) -> bytes:
    return frames.write_connect(1, Connect(1, flags, name, b"", -1, -1, []))


def request(method: str, path: str, body: bytes = b"", more: bytes = b"") -> bytes:
    head = b"%b %b HTTP/1.1\r\nhost: localhost\r\n" % (method.encode(), path.encode())
    if body:
        head += b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
    return head + more + b"\r\n" + body


# ---- what is begun and not ended ----


def trickle(
    address: Address, count: int, begin: Callable[[int], bytes], drop: bytes, *, connect: bool = False
) -> dict[str, object]:
    """On so many connections (after CONNECT) send the beginning as fast as it is taken, then a byte now and then;
    who is thrown out comes again."""
    opened_at_all = 0
    left: dict[socket.socket, memoryview] = {}
    told = False
    due = 0.0
    while not told_to_stop(0.01):
        for sock in opened(address, min(100, count - len(left)), connect=connect):
            left[sock] = memoryview(begin(opened_at_all))
            opened_at_all += 1
        if not told and opened_at_all >= count:
            told = True
            at_it()
        slow = time.monotonic() >= due
        due = time.monotonic() + 1.0 if slow else due
        for sock in list(left):
            try:
                if left[sock]:
                    left[sock] = left[sock][sock.send(left[sock][: 1 << 16]) :]
                elif slow and drop:
                    sock.send(drop)
                with suppress(BlockingIOError):
                    if not sock.recv(1 << 16):
                        raise ConnectionError
            except BlockingIOError:
                pass
            except OSError:
                sock.close()
                del left[sock]
    return {"opened": opened_at_all, "still_open": len(left)}


def frames_before_connect(doors: Doors, count: int) -> dict[str, object]:
    """The head of a long frame, as the first thing."""
    head = frames.HEADER.pack(UNFINISHED_BYTES, frames.FrameType.PUBLISH, 0, 0, 9)
    return trickle(doors.server, count, lambda rank: head + b"x" * (UNFINISHED_BYTES - 1000), b"x")


def unfinished(server: Address, count: int, size: int) -> dict[str, object]:
    prefix = frames.publish_prefix(AckLevel.DURABLE, TOPIC, 0)
    head = frames.HEADER.pack(UNFINISHED_BYTES, frames.FrameType.PUBLISH, 0, 0, 9) + prefix
    return trickle(server, count, lambda rank: head + b"x" * size, b"x", connect=True)


def unfinished_frames(doors: Doors, count: int) -> dict[str, object]:
    """Most of a PUBLISH of 4 MiB, then a byte now and then."""
    return unfinished(doors.server, count, UNFINISHED_BYTES - 1000)


def begun_frames(doors: Doors, count: int) -> dict[str, object]:
    """So little of a PUBLISH of 4 MiB that all of them together stay within the limit."""
    return unfinished(doors.server, count, (28 << 20) // count)


def one_byte(doors: Doors, count: int) -> dict[str, object]:
    return trickle(doors.server, count, lambda rank: b"\0", b"")


def half_heads(doors: Doors, count: int) -> dict[str, object]:
    return trickle(doors.admin, count, lambda rank: b"GET /v1/node HTTP/1.1\r\nx: ", b"x")


def half_bodies(doors: Doors, count: int) -> dict[str, object]:
    """A poll may be long."""
    head = request("POST", "/v1/pipe", b"x" * UNFINISHED_BYTES)
    return trickle(doors.pipe, count, lambda rank: head[:-1000], b"x")


# ---- answers that are not read ----


def unread_answers(doors: Doors, count: int) -> dict[str, object]:
    """64 KB of requests whose answers are long, on each connection."""
    line = request("GET", "/v1/topics")
    return trickle(doors.admin, count, lambda rank: line * (65536 // len(line)), b"")


# ---- state without end ----


def asked(address: Address, data: bytes) -> tuple[int, bytes]:
    """The answer to one request on a connection of its own: status and body."""
    with socket.create_connection(address, 30.0) as sock:
        sock.sendall(data.replace(b"\r\n", b"\r\nconnection: close\r\n", 1))
        found = b"".join(iter(lambda: sock.recv(1 << 16), b""))
    head, _, body = found.partition(b"\r\n\r\n")
    return int(head.split()[1]), body


def producers(doors: Doors, count: int) -> dict[str, object]:
    """A new name with every CONNECT, on one connection."""
    at_it()
    with socket.create_connection(doors.server, 30.0) as sock:
        for rank in range(count):
            sock.sendall(connect_frame(f"name-{rank}", frames.WANT_PRODUCER))
            sock.recv(1 << 16)
            if rank % 100 == 0 and told_to_stop():
                break
    told_to_stop(3600.0)
    return {"names": rank + 1}


def subscriptions(doors: Doors, count: int) -> dict[str, object]:
    """Readers that want all partitions of all topics; they take what they get, and say that they are there."""
    topics = [one["name"] for one in json.loads(asked(doors.admin, request("GET", "/v1/topics"))[1])["topics"]]
    lines = [Wanted(topic, -1, Start.EARLIEST, NO_LOG_ID, -1, 0) for topic in topics]
    joining = frames.write_subscribe(2, Subscribe(Intent.JOIN, "", 0, 0, lines))
    return trickle(doors.server, count, lambda rank: joining, frames.write_heartbeat([]), connect=True)


def invented_nodes(doors: Doors, count: int) -> dict[str, object]:
    """A child that has heard of very many nodes below it."""
    sender = "ab" * 16
    poll = {"version": 1, "uid": sender, "name": "evil", "level": "local", "topics": [], "logs": []}
    taken, refused = 0, 0
    with socket.create_connection(doors.pipe, 30.0) as sock:
        sock.sendall(request("POST", "/v1/pipe", json.dumps(poll).encode()))
        sock.recv(1 << 16)
        at_it()
        for first in _until_stopped(range(0, count, 250)):
            nodes = [
                {
                    "report": {
                        "uid": f"{number:032x}", "name": f"n{number}", "level": "pos", "version": "1", "boot": "0" * 16,
                        "number": 1, "address": f"203.0.113.66:{number % 60000 + 1}", "region": "eu/north/1",
                    }
                }
                for number in range(first, first + 250)
            ]  # fmt: skip
            batch = {"sender": sender, "session": f"s{first}", "number": 0, "nodes": nodes}
            status, _ = asked(doors.pipe, request("POST", "/v1/tree/reports", json.dumps(batch).encode()))
            taken, refused = taken + (status == 200), refused + (status != 200)
        told_to_stop(3600.0)
    return {"batches_taken": taken, "batches_refused": refused}


def _until_stopped(ranks: range) -> Iterator[int]:
    for rank in ranks:
        if told_to_stop():
            return
        yield rank


KINDS: dict[str, Callable[[Doors, int], dict[str, object]]] = {
    "frames-before-connect": frames_before_connect,
    "unfinished-frames": unfinished_frames,
    "begun-frames": begun_frames,
    "one-byte": one_byte,
    "half-heads": half_heads,
    "half-bodies": half_bodies,
    "unread-answers": unread_answers,
    "producers": producers,
    "subscriptions": subscriptions,
    "invented-nodes": invented_nodes,
}

if __name__ == "__main__":
    main()
