"""TLS on the loop: what goes in comes out whatever the socket takes, and nobody costs more than is named."""

from __future__ import annotations

import os
import random
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgebroker.common.runtime.clock import SystemClock
from edgebroker.network.io import tls
from edgebroker.network.io.loop import Loop
from edgebroker.network.io.tls import Handshakes, PeerRefusedError, TlsChannel
from edgebroker.network.io.transport import FileRange, Transport
from edgebroker.network.wire.connection import ReceiveBuffer
from tests.kit.clock import ManualClock
from tests.kit.fleets import Machine, TestFleet

SECONDS = 20.0


class Received:
    """Owner of a transport: what came, and what was said of its end."""

    def __init__(self) -> None:
        self.data, self.closed = bytearray(), list[str]()
        self.drained = 0

    def on_data(self, buffer: ReceiveBuffer, received: int) -> None:
        self.data += buffer.room[:received]

    def on_drained(self) -> None:
        self.drained += 1

    def on_closed(self, reason: str) -> None:
        self.closed.append(reason)


class Stage:
    """A loop with the handshakes of one node, and listening sockets."""

    def __init__(self, loop: Loop, server: Machine, client: Machine) -> None:
        self.loop, self.refused = loop, list[tuple[str, str]]()
        self.server = Handshakes(
            loop, lambda: server.server, lambda: server.client, self.identify, lambda *told: self.refused.append(told)
        )
        self.client = Handshakes(
            loop, lambda: client.server, lambda: client.client, self.identify, lambda *told: self.refused.append(told)
        )
        self.not_wanted = ""
        self.accepted: list[TlsChannel] = []
        self.made: list[TlsChannel] = []
        self._ends: list[socket.socket] = []

    def identify(self, sock: ssl.SSLSocket) -> str:
        shown = sock.getpeercert()
        name = str(shown["subjectAltName"][0][1]) if shown else ""  # type: ignore[index]
        if self.not_wanted and self.not_wanted in name:
            raise PeerRefusedError("it is not wanted")
        return name

    def arrive(self, peer: str = "192.0.2.1:1") -> socket.socket:
        """A peer that connected and says nothing yet: its end."""
        ours, theirs = connection()
        self._ends.append(theirs)
        self.server.serve(ours, peer, lambda channel, peer: self.accepted.append(channel))
        return theirs

    def close(self) -> None:
        """End everything: a warning of a socket that was left open is an error."""
        self.server.close()
        for _ in range(3):
            self.loop.turn(0.0)
        for end in (*self._ends, *self.accepted, *self.made):
            end.close()
        self.loop.close()

    def turn(self, until: Callable[[], object]) -> None:
        clock = SystemClock()
        end = clock.monotonic() + SECONDS
        while not until():
            assert clock.monotonic() < end
            self.loop.turn(0.01)

    def pair(self) -> tuple[TlsChannel, TlsChannel]:
        """Both ends of a connection, after the handshake: the server's, the client's."""
        done: list[TlsChannel | None] = []
        self.client.connect(self.arrive(), lambda channel, why: done.append(channel))
        self.turn(lambda: done and self.accepted)
        assert done[0] is not None
        self.made += [self.accepted.pop(), done[0]]
        return self.made[-2], self.made[-1]


def connection() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        theirs = socket.create_connection(listener.getsockname())
        ours, _ = listener.accept()
    return ours, theirs


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> TestFleet:
    return TestFleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture
def stage(fleet: TestFleet) -> Iterator[Stage]:
    loop = Loop(SystemClock())
    found = Stage(loop, fleet.admit("1" * 32, "pos"), fleet.admit("2" * 32))
    yield found
    found.close()


def test_both_ends_know_each_other(stage: Stage) -> None:
    server, client = stage.pair()
    assert (server.identity, client.identity) == (
        f"edgebroker://acme/local/eu/1/{'2' * 32}",
        f"edgebroker://acme/pos/eu/1/{'1' * 32}",
    )


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_sent_arrives(stage: Stage, tmp_path: Path, seed: int) -> None:
    """Pieces of all sizes and files, through sockets that take little, in both directions at once."""
    chance = random.Random(seed)
    path = tmp_path / "stored"
    stored = chance.randbytes(700_000)
    path.write_bytes(stored)
    fd = os.open(path, os.O_RDONLY)
    os.pread(fd, len(stored), 0)
    ends, sent = [], [bytearray(), bytearray()]
    for channel in stage.pair():
        channel._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
        owner = Received()
        size = chance.choice((4096, 20_000, 1 << 20))
        ends.append((owner, Transport(stage.loop, channel, ReceiveBuffer(size), owner, "peer")))
    loads: list[FileRange] = []
    for _ in range(60):
        side = chance.randrange(2)
        transport = ends[side][1]
        stage.turn(lambda transport=transport: transport.backlog < 100_000)  # type: ignore[misc]
        what = chance.randrange(4)
        data = chance.randbytes(chance.choice((1, 200, 16383, 16384, 16385, 70_000, 300_000)))
        if what == 0:
            transport.send(data)
        elif what == 1:
            transport.send_pair(data[:7], memoryview(data)[7:])
        elif what == 2:
            transport.send_parts([data[:100], data[100:101], data[101:]])
        else:
            first, size = chance.randrange(300_000), chance.choice((1, 5000, 65536, 400_000))
            transport.send_file(data[:20], FileRange(fd, first, size, lambda: None, loads.append))
            data = data[:20] + stored[first : first + size]
        sent[side] += data
        if chance.random() < 0.3:
            stage.loop.turn(0.0)
        for load in loads:
            end = ends[0][1] if load in (ends[0][1]._out or ()) else ends[1][1]
            end.supply(load, memoryview(os.pread(fd, load.length, load.position)), "")
        loads.clear()
    stage.turn(lambda: len(ends[0][0].data) == len(sent[1]) and len(ends[1][0].data) == len(sent[0]))
    assert (ends[0][0].data, ends[1][0].data) == (sent[1], sent[0])
    for _, transport in ends:
        transport.close("done")
    os.close(fd)


def test_a_peer_that_is_held_and_let_go_again(stage: Stage) -> None:
    """What OpenSSL has decrypted already does not wait for the next bytes: the buffer is smaller than a record."""
    server, client = stage.pair()
    owner = Received()
    transport = Transport(stage.loop, server, ReceiveBuffer(1000), owner, "peer")
    data = os.urandom(16_000)
    assert client.send([data]) == len(data)
    stage.turn(lambda: owner.data)
    transport.pause()
    for _ in range(5):
        stage.loop.turn(0.01)
    held = len(owner.data)
    assert held < len(data)
    transport.resume()
    stage.turn(lambda: owner.data == data)


def test_the_end_of_a_connection(stage: Stage) -> None:
    server, client = stage.pair()
    owner = Received()
    Transport(stage.loop, server, ReceiveBuffer(), owner, "peer")
    client.close()
    stage.turn(lambda: owner.closed)
    assert owner.closed == ["the peer closed the connection"]


def test_bytes_that_are_not_tls(stage: Stage) -> None:
    server, client = stage.pair()
    owner = Received()
    Transport(stage.loop, server, ReceiveBuffer(), owner, "peer")
    os.write(client.fileno(), b"x" * 100)
    stage.turn(lambda: owner.closed)
    assert owner.closed[0].startswith("TLS: ")


# ---- who is let in ----


def said(stage: Stage) -> str:
    stage.turn(lambda: stage.refused)
    return stage.refused.pop()[1]


@pytest.mark.parametrize(
    "first", [b"POST / HTTP/1.1\r\n", b"\0\0\0\x10\x01\0\0\0", b"\x17\x03\x03\0\x10", b"\x16\x03\x01\xff\xff"]
)
def test_without_tls(stage: Stage, first: bytes) -> None:
    with stage.arrive() as peer:
        peer.sendall(first)
        assert said(stage) == "it does not speak TLS"
        with pytest.raises(ConnectionResetError):  # without an answer
            peer.recv(100)


def test_plain_is_for_those_who_may(stage: Stage) -> None:
    called: list[bool] = []
    ours, peer = connection()
    stage.server.serve(ours, "127.0.0.1:1", lambda channel, peer: None, lambda: called.append(True))
    with peer:
        peer.sendall(bytes(16))
        stage.turn(lambda: called)
    assert not stage.refused
    ours.close()


def test_a_client_hello_byte_by_byte(stage: Stage, fleet: TestFleet) -> None:
    """It costs nothing here until it is whole, and the loop does not spin meanwhile."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = fleet.root.client.wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    with stage.arrive() as peer:
        for byte in hello[:-1]:
            peer.sendall(bytes([byte]))
            stage.loop.turn(0.0)
        before = stage.loop.iterations
        stage.loop.turn(0.05)
        assert (stage.loop.iterations - before, stage.server._under_way.total()) == (1, 0)
        peer.sendall(hello[-1:])
        stage.turn(lambda: stage.server._under_way.total())


def test_half_a_client_hello(stage: Stage) -> None:
    with stage.arrive() as peer:
        peer.sendall(b"\x16\x03\x01\x02\x00\x01")
        stage.loop.turn(0.01)
        peer.shutdown(socket.SHUT_WR)
        assert said(stage) == "it closed the connection before its ClientHello"


@pytest.mark.parametrize("first", [b"", b"\x16\x03\x01\x02\x00\x01"])
def test_deadline(fleet: TestFleet, first: bytes) -> None:
    clock = ManualClock()
    loop = Loop(clock)
    stage = Stage(loop, fleet.admit("1" * 32, "pos"), fleet.admit("2" * 32))
    with stage.arrive() as peer:
        peer.sendall(first)
        loop.turn(0.0)
        clock.advance(tls.HANDSHAKE_SECONDS + 1)
        loop.turn(0.0)
        loop.turn(0.0)
        assert stage.refused == [("192.0.2.1:1", "it says nothing, or not all of its ClientHello")]
    stage.close()


def test_so_many_handshakes_at_a_time(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one host four, of all together as many as there is room for; the others wait, and have their turn."""
    monkeypatch.setattr(tls, "MOST_AT_ONCE", 6)
    ends = [stage.arrive(f"192.0.2.{rank % 3}:{rank}") for rank in range(30)]
    threads = [threading.Thread(target=handshake, args=(stage, end), daemon=True) for end in ends]
    most = 0
    for thread in threads:
        thread.start()
    clock = SystemClock()
    until = clock.monotonic() + SECONDS
    while len(stage.accepted) < 30:
        assert clock.monotonic() < until
        stage.loop.turn(0.01)
        most = max(most, stage.server._under_way.total())
        assert all(count <= tls.MOST_OF_A_HOST for count in stage.server._under_way.values())
    assert most <= 6
    for thread in threads:
        thread.join(SECONDS)


def handshake(stage: Stage, end: socket.socket) -> None:
    with stage.client._client().wrap_socket(end) as sock:
        sock.do_handshake()


def test_too_many_that_wait(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tls, "MOST_WAITING_OF_A_HOST", 2)
    ends = [stage.arrive("192.0.2.1:1") for _ in range(3)] + [stage.arrive("127.0.0.1:1") for _ in range(3)]
    assert [why for _, why in stage.refused] == ["too many connections wait for their handshake"]
    monkeypatch.setattr(tls, "MOST_WAITING", 5)
    ends.append(stage.arrive("192.0.2.9:1"))
    assert len(stage.refused) == 2
    for end in ends:
        end.close()


def test_who_is_refused_by_name(stage: Stage) -> None:
    stage.not_wanted = "/local/"
    done: list[TlsChannel | None] = []
    stage.client.connect(stage.arrive(), lambda channel, why: done.append(channel))
    assert said(stage) == "it is not wanted"
    stage.made += [channel for channel in done if channel is not None]


def test_a_certificate_of_another_fleet(stage: Stage, tmp_path: Path) -> None:
    other = TestFleet(tmp_path, "other").admit("3" * 32)
    client = Handshakes(stage.loop, lambda: other.server, lambda: other.client, stage.identify, lambda *told: None)
    told: list[str] = []
    client.connect(stage.arrive(), lambda channel, why: told.append(why))
    stage.turn(lambda: told)
    assert told == ["the certificate of the peer is not valid: unable to get local issuer certificate"]


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_old_versions(stage: Stage, version: ssl.TLSVersion) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = context.maximum_version = version
    end = stage.arrive()
    failed: list[OSError] = []

    def connect() -> None:
        with context.wrap_socket(end, do_handshake_on_connect=False) as sock:
            try:
                sock.do_handshake()
            except OSError as error:
                failed.append(error)

    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    assert said(stage) in ("unsupported protocol", "wrong ssl version", "version too low", "no protocols available")
    thread.join(SECONDS)
    assert failed
