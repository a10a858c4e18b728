"""The attacks, one function each: it is given a node and honest users, and tells what became of it.

The numbers are those of the table in docs/benchmarks.md.
"""

from __future__ import annotations

import gzip
import http.client
import json
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from edgebroker import Consumer, Producer
from edgebroker.cli.admin_client import call
from edgebroker.common import batch
from edgebroker.common.crc32c import crc32c
from edgebroker.common.errors import Code
from edgebroker.network.wire import frames
from tests.attack.attacker import asked, opened, request
from tests.attack.stand import Stand
from tests.kit.raw_client import RawClient

BUDGET_MIB = 32  # limits.receive_bytes
ELSEWHERE = ("127.0.0.2", 0)


class Outcome(NamedTuple):
    """What an attack led to, in figures, and whether the node held."""

    figure: str
    held: bool


class Attack(NamedTuple):
    """`descriptors`: the limit of the node, 0: the usual one."""

    number: str
    what: str
    run: Callable[[Stand], Outcome]
    descriptors: int = 0


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    return host, int(port)


def admin_of(stand: Stand) -> tuple[str, int]:
    return _split(stand.process.admin)


def pipe_of(stand: Stand) -> tuple[str, int]:
    return _split(stand.process.pipe)


def server_of(stand: Stand) -> tuple[str, int]:
    return _split(stand.process.server)


def post(address: tuple[str, int], path: str, body: object) -> tuple[int, bytes]:
    return asked(address, request("POST", path, json.dumps(body).encode()))


def post_from_elsewhere(stand: Stand, path: str, body: object) -> int:
    connection = http.client.HTTPConnection(*pipe_of(stand), timeout=30.0, source_address=ELSEWHERE)
    connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
    status = connection.getresponse().status
    connection.close()
    return status


def values(stand: Stand, topic: str = "prices") -> list[bytes | None]:
    """All records of a topic, as a reader of the child gets them."""
    end = call(stand.child.admin, "GET", f"/v1/topics/{topic}")["partitions"][0]["durable_end"]
    found: list[bytes | None] = []
    with Consumer(stand.child.server, [topic]) as consumer:
        while len(found) < end:
            found += [record.value for record in consumer.poll(10.0)]
    return found


# ---- false words ----


def invented_poll(stand: Stand) -> Outcome:
    """0 and 2: a child that claims to have more, and offers it."""
    stand.feel(0.5)
    hello = {"version": 1, "uid": "cd" * 16, "name": "evil", "level": "local", "topics": ["prices"]}
    found = call(stand.socket, "GET", "/v1/topics/prices")["partitions"][0]
    line = ["prices", 0, found["log_id"], 1, 1 << 40, 7, 0, [], True]
    end = stand.end(stand.socket)
    begun = time.monotonic()
    with socket.create_connection(pipe_of(stand), 30.0) as poll, Producer(stand.process.server) as producer:
        poll.sendall(request("POST", "/v1/pipe", json.dumps({**hello, "logs": [line]}).encode()))
        status = poll.recv(1 << 16).split()[1].decode()
        producer.send("prices", b"honest").result(30.0)
    held = time.monotonic() - begun
    repaired, _ = post(admin_of(stand), "/v1/repair", {"from": "203.0.113.9:7421"})
    problems = call(stand.socket, "GET", "/v1/node")["problems"]
    good = held < 7.0 and repaired == 400 and not problems and stand.end(stand.socket) == end + 1
    return Outcome(f"poll {status}; publishing held for {held:.1f} s; repair from elsewhere {repaired}", good)


def stolen_identity(stand: Stand) -> Outcome:
    """10: reports and polls as the child, from another address; 1: a hub that is invented by asking."""
    child = call(stand.child.admin, "GET", "/v1/node")["uid"]
    report = {
        "uid": child, "name": "till", "level": "local", "version": "1", "boot": "f" * 16, "number": 10**15,
        "address": "203.0.113.9:7421", "problems": ["invented"],
    }  # fmt: skip
    sent = {"sender": child, "session": "s", "number": 0, "nodes": [{"report": report}]}
    reported = post_from_elsewhere(stand, "/v1/tree/reports", sent)
    poll = {"version": 1, "uid": child, "name": "till", "level": "local", "topics": ["*"], "logs": []}
    polled = post_from_elsewhere(stand, "/v1/pipe", poll)
    hub = {**report, "uid": "e" * 32, "level": "pos", "region": "north/1"}
    asking = {
        "uid": "d" * 32,
        "name": "x",
        "level": "local",
        "version": "1",
        "boot": "0" * 16,
        "number": 1,
        "region": "north/1",
    }
    before = post(pipe_of(stand), "/v1/registry", {"report": asking})[1]
    post(pipe_of(stand), "/v1/registry", {"report": hub})
    same = post(pipe_of(stand), "/v1/registry", {"report": asking})[1] == before
    nodes = call(stand.socket, "GET", "/v1/tree/nodes")["nodes"]
    invented = [node["name"] for node in nodes if node["address"] or node["problems"]]
    figure = f"report {reported}, poll {polled}; candidates {'as before' if same else 'CHANGED'}"
    return Outcome(figure, (reported, polled) == (409, 503) and same and not invented and stand.child_follows)


def other_sites(stand: Stand) -> Outcome:
    """3: what a page in a browser on the machine can send."""
    refused, asked_for = 0, 0
    heads = [
        b"origin: http://evil.example\r\n", b"sec-fetch-site: cross-site\r\n", b"origin: null\r\n",
    ]  # fmt: skip
    for method, path in (
        ("POST", "/v1/topics"),
        ("POST", "/v1/promote"),
        ("GET", "/v1/node"),
        ("DELETE", "/v1/topics/prices?confirm=prices"),
    ):
        for head in heads:
            asked_for += 1
            refused += asked(admin_of(stand), request(method, path, b"{}", head))[0] == 403
        asked_for += 2
        rebound = request(method, path, b"{}").replace(b"host: localhost", b"host: evil.example")
        refused += asked(admin_of(stand), rebound)[0] == 403
        plain = request(method, path, b"{}").replace(b"application/json", b"text/plain")
        refused += asked(admin_of(stand), plain)[0] in (403, 415) or method == "GET"
    left = call(stand.socket, "GET", "/v1/topics")["topics"]
    return Outcome(
        f"{refused} of {asked_for} refused", refused == asked_for and [one["name"] for one in left] == ["prices"]
    )


def borrowed_producer(stand: Stand) -> Outcome:
    """13: publishing with the producer id of another one."""
    owner, thief = RawClient(server_of(stand)), RawClient(server_of(stand))
    granted = owner.connect("owner", flags=frames.WANT_PRODUCER)
    thief.connect("thief")
    codes = [
        client.publish(
            "prices",
            batch.encode([(None, b"v", 1)], producer_id=granted.producer_id, producer_epoch=0, base_sequence=sequence),
        ).code
        for client, sequence in ((owner, 0), (thief, 1), (owner, 1))
    ]
    for client in (owner, thief):
        client.close()
    figure = ", ".join(code.name for code in codes)
    return Outcome(f"owner, thief, owner: {figure}", codes == [Code.OK, Code.FENCED, Code.OK])


# ---- too much ----


def flood(kind: str) -> Callable[[Stand], Outcome]:
    def run(stand: Stand) -> Outcome:
        stand.under(kind, 20, "benchmarks.flooder")
        return Outcome(stand.figures(), stand.unmoved and stand.child_follows)

    return run


def many(kind: str, count: int, most_kept: float = 10) -> Callable[[Stand], Outcome]:
    """Connections that begin something: bounded memory, which is back afterwards but for so many MiB."""

    def run(stand: Stand) -> Outcome:
        got = stand.under(kind, count)
        grown, kept = (one.memory - stand.quiet.memory for one in (stand.felt, stand.after))
        held = grown <= BUDGET_MIB + 10 and kept <= most_kept and stand.felt.operator < 1.0 and stand.felt.most < 1.0
        return Outcome(
            f"{got['opened']} connections in all; {stand.figures()}",
            held and stand.child_follows,
        )

    return run


def unread(stand: Stand) -> Outcome:
    """4: one connection, 64 KB of requests, answers of 300 KB that are not read."""
    call(stand.socket, "POST", "/v1/topics", {"name": "wide", "partitions": 1024})
    stand.quiet = stand.feel(0.5)
    return many("unread-answers", 1)(stand)


def few_descriptors(stand: Stand) -> Outcome:
    """8: idle clients take what they get, and topics are created."""
    idle = opened(server_of(stand), 500)
    with Producer(stand.process.server) as producer:
        sent = [producer.send(f"topic-{rank}", b"v") for rank in range(200)]
        stored = sum(1 for one in sent if one.result(30.0) >= 0)
    made = [post(admin_of(stand), "/v1/topics", {"name": f"wide-{rank}", "partitions": 1024})[0] for rank in range(4)]
    problems = call(stand.socket, "GET", "/v1/node")["problems"]
    used = sum(1 for _ in Path(f"/proc/{stand.process.pid}/fd").iterdir())
    for sock in idle:
        sock.close()
    figure = f"{stored} of 200 stored beside 500 clients, 4 x 1,024 partitions {made}, {used} of 512 descriptors"
    return Outcome(figure, stored == 200 and set(made) == {201} and used < 512 and "disk_full" not in problems)


def invented(stand: Stand) -> Outcome:
    """9: a child that has heard of 66,000 nodes; an operator removes them when it is gone."""
    stand.under("invented-nodes", 66_000)
    known = call(stand.socket, "GET", "/v1/tree")["levels"]
    count = sum(level["nodes"] for level in known.values())
    time.sleep(16.0)  # it is not lost before
    begun = time.perf_counter()
    removed = call(stand.socket, "DELETE", "/v1/registry?silent=0")["removed"]
    took = time.perf_counter() - begun
    figure = f"{count} taken; {stand.figures()}; {removed} removed in {took:.1f} s"
    return Outcome(figure, removed >= count - 1 and count < 20_000 and stand.felt.most < 1.0)


def names(stand: Stand) -> Outcome:
    """15: 20,000 producer names, on one connection."""
    got = stand.under("producers", 20_000)
    grown = stand.after.memory - stand.quiet.memory
    return Outcome(f"{got['names']} names; {stand.figures()}", grown < 20 and stand.felt.most < 1.0)


def everything(stand: Stand) -> Outcome:
    """19: readers of 10,000 partitions; only a few can be given what they want."""
    for rank in range(10):
        call(stand.socket, "POST", "/v1/topics", {"name": f"wide-{rank}", "partitions": 999})
    stand.quiet = stand.feel(1.0)
    stand.under("subscriptions", 1000)
    grown, kept = (one.memory - stand.quiet.memory for one in (stand.felt, stand.after))
    return Outcome(stand.figures(), stand.unmoved and stand.child_follows and grown < 100 and kept < 40)


# ---- what cannot be read ----


def strange_records(stand: Stand) -> Outcome:
    """16 and 18: a time to live of 5,000 digits; bodies with something behind the end."""
    with Producer(stand.process.server) as producer:
        producer.send("prices", b"digits", headers=[("eb-ttl-ms", b"9" * 5000)]).result(10.0)
    good = batch.encode([(None, b"packed", 1)], codec="gzip")
    packer = RawClient(server_of(stand))
    packer.connect("packer")
    code = packer.publish("prices", _resealed(good + gzip.compress(b"more"))).code
    packer.close()
    assert stand.child_follows
    read = b"digits" in values(stand)
    return Outcome(
        f"5,000 digits {'read' if read else 'NOT READ'}, a second member {code.name}",
        read and code is Code.INVALID_BATCH,
    )


def _resealed(raw: bytes) -> bytes:
    data = bytearray(raw)
    data[8:12] = struct.pack(">i", len(data) - 12)
    data[17:21] = struct.pack(">I", crc32c(bytes(data[21:])))
    return bytes(data)


def strange_requests(stand: Stand) -> Outcome:
    """17, 18 and requests that two servers read differently."""
    deep = b'{"x":' + b"[" * 60_000
    answers = [
        asked(door, request("POST", path, deep))[0]
        for door, path in (
            (pipe_of(stand), "/v1/pipe"),
            (pipe_of(stand), "/v1/registry"),
            (admin_of(stand), "/v1/topics"),
            (pipe_of(stand), "/v1/tree/reports"),
        )
    ]
    far = asked(admin_of(stand), request("PATCH", "/v1/topics/prices", json.dumps({"retention_ms": 10**30}).encode()))[
        0
    ]
    both = request("POST", "/v1/topics", b"{}", b"transfer-encoding: chunked\r\n")
    smuggled = asked(admin_of(stand), both)[0]
    log = stand.process.log_path.read_text()
    figure = f"deep JSON {answers}, 10^30 {far}, two lengths {smuggled}"
    return Outcome(figure, {*answers, far, smuggled} == {400} and "Traceback" not in log)


def hostile_copy(stand: Stand) -> Outcome:
    """11: a backup whose names lead out of the directory, restored by an operator."""
    directory = Path(stand.process.directory).parent
    copy, target, victim = directory / "copy", directory / "restored", directory / "victim"
    environment = {**os.environ, "EDGEBROKER_ADMIN": stand.socket}
    program = [sys.executable, "-m", "edgebroker"]
    subprocess.run(
        [*program, "backup", str(copy), "--admin", stand.socket], check=True, env=environment, capture_output=True
    )
    victim.mkdir()
    (victim / "authorized_keys").write_text("mine")
    manifest = copy / "BACKUP"
    text = manifest.read_text()
    manifest.write_text(text.replace('"prices"', '"../../victim"').replace("prices/0", "../../victim"))
    (copy / "link").symlink_to(victim)
    done = subprocess.run(
        [*program, "restore", str(copy), "--data-dir", str(target)], env=environment, capture_output=True, text=True
    )
    untouched = [one.name for one in victim.iterdir()] == ["authorized_keys"] and (
        victim / "authorized_keys"
    ).read_text() == "mine"
    return Outcome(
        f"restore ended with {done.returncode}: {done.stderr.strip()[:70]}",
        done.returncode != 0 and untouched and "Traceback" not in done.stderr,
    )


def pipe_only(stand: Stand) -> Outcome:
    """1 and 12: who reaches the port for children reaches no administration."""
    refused = [
        asked(pipe_of(stand), request(method, path, b"{}"))[0]
        for method, path in (
            ("POST", "/v1/promote"), ("DELETE", "/v1/topics/t?confirm=t"), ("PUT", "/v1/registry/x/pins"),
            ("POST", "/v1/repair"), ("GET", "/metrics"), ("POST", "/v1/topics"), ("DELETE", "/v1/registry"),
        )
    ]  # fmt: skip
    return Outcome(f"{refused}", set(refused) <= {404, 405})


FLOODS = {
    "ack": "stale acknowledgements", "heartbeat": "HEARTBEAT", "connect": "CONNECT again", "join": "JOIN and LEAVE",
    "topics": "CONNECT with 1,000 topics", "reset": "RESET", "epoch": "new producer epochs", "get": "pipelined GET",
}  # fmt: skip
ATTACKS = [
    Attack("0, 2", "a poll that claims more than the origin has; repair from elsewhere", invented_poll),
    Attack("1, 10", "the identity of a child, from another address; an invented hub", stolen_identity),
    Attack("1, 12", "administration through the port for children", pipe_only),
    Attack("3", "a page in a browser on the machine", other_sites),
    Attack("4", "64 KB of requests whose long answers are not read", unread),
    *(Attack("5", f"20 connections of {name}", flood(kind)) for kind, name in FLOODS.items()),
    Attack("6", "1,000 unfinished frames before CONNECT", many("frames-before-connect", 1000)),
    Attack("6", "1,000 unfinished frames of 4 MiB", many("unfinished-frames", 1000)),
    Attack("6", "1,000 unfinished frames within the limit", many("begun-frames", 1000)),
    Attack("7", "1,000 connections with half a head", many("half-heads", 1000)),
    Attack("7", "1,000 connections with half a body of 4 MiB", many("half-bodies", 1000)),
    Attack("7", "10,000 connections with half a head", many("half-heads", 10_000, most_kept=25)),
    Attack("7", "10,000 connections with one byte", many("one-byte", 10_000, most_kept=25)),
    Attack("8", "descriptors: clients and topics", few_descriptors, descriptors=512),
    Attack("9", "66,000 invented nodes", invented),
    Attack("11", "a backup that leads out of its directory", hostile_copy),
    Attack("13", "the producer id of another one", borrowed_producer),
    Attack("15", "20,000 producer names", names),
    Attack("16, 18", "records that other readers stumble over", strange_records),
    Attack("19", "1,000 readers of 10,000 partitions each", everything),
    Attack("17, 18", "requests that cannot be meant", strange_requests),
]  # fmt: skip
