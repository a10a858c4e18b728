"""Requests as they come from a connection, against h11 on the same bytes: what is read here, it reads the same way."""

from __future__ import annotations

import random

import h11
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from edgebroker.network.http.request_reader import MAX_HEAD_BYTES, BadRequestError, RequestReader

Found = list[tuple[str, str, bytes]]
LIMIT = 2000
HOST = b"Host: localhost\r\n"
GET = b"GET / HTTP/1.1\r\n" + HOST


def read(*pieces: bytes) -> tuple[Found, str]:
    """All requests in these bytes, and why the next one could not be read."""
    reader, found = RequestReader(lambda method, target: LIMIT), Found()
    try:
        for piece in pieces:
            reader.feed(piece)
            while (request := reader.next()) is not None:
                found.append((request.method, request.target, request.body))
                if not request.keeps:
                    return found, "closed"
    except BadRequestError as error:
        return found, f"{error.status} {error}"
    return found, ""


def read_by_h11(data: bytes) -> tuple[Found, bool]:
    """The requests, and whether what follows is refused."""
    connection, found = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES), Found()
    connection.receive_data(data)
    request, body = None, b""
    try:
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA or event is h11.PAUSED:
                return found, False
            if isinstance(event, h11.Request):
                request, body = event, b""
            elif isinstance(event, h11.Data):
                body += event.data
            elif isinstance(event, h11.EndOfMessage):
                assert request is not None
                found.append((request.method.decode(), request.target.decode("latin-1"), bytes(body)))
                connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
                connection.send(h11.EndOfMessage())
                if connection.our_state is h11.MUST_CLOSE:
                    return found, False
                connection.start_next_cycle()
            else:
                return found, False
    except h11.RemoteProtocolError:
        return found, True


NAMES = st.sampled_from([b"x-one", b"Accept", b"content-type", b"ORIGIN", b"X-" + b"n" * 50])
VALUES = st.sampled_from([b"", b"a", b"text/plain; charset=utf-8", b"a, b", b"\xe9", b"v" * 200])
LINES = st.lists(st.tuples(NAMES, VALUES), max_size=4)


@st.composite
def requests(draw: st.DrawFn) -> bytes:
    method = draw(st.sampled_from([b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS"]))
    target = draw(st.sampled_from([b"/", b"/v1/topics?a=b&c", b"*", b"http://localhost/x", b"/%20/" + b"p" * 100]))
    head = b"%b %b HTTP/1.1\r\n%b" % (method, target, HOST)
    head += b"".join(b"%b: %b\r\n" % line for line in draw(LINES))
    body = draw(st.binary(max_size=60))
    if draw(st.booleans()):
        return head + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    return head + b"\r\n"


@settings(deadline=None, derandomize=True, max_examples=150)
@given(st.lists(requests(), min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_requests_cut_anywhere(them: list[bytes], draw: random.Random) -> None:
    data = b"".join(them)
    whole = read(data)
    assert whole == (read_by_h11(data)[0], "")
    assert len(whole[0]) == len(them)
    assert read(*(data[at : at + 1] for at in range(len(data)))) == whole
    cuts = sorted(draw.randrange(len(data) + 1) for _ in range(4))
    assert read(*(data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True))) == whole


@settings(deadline=None, derandomize=True, max_examples=600)
@given(st.lists(requests(), min_size=1, max_size=2), st.randoms(use_true_random=False))
def test_what_is_read_of_strange_bytes_is_what_h11_reads(them: list[bytes], draw: random.Random) -> None:
    """Where two servers read different requests, one of them can be fooled: both read the same, or one refuses."""
    data = bytearray(b"".join(them))
    for _ in range(draw.randrange(1, 4)):
        place = draw.randrange(len(data))
        if draw.random() < 0.3:
            data[place:place] = draw.choice([b"\r\n", b" ", b":", b"Content-Length: 3\r\n", b"\n", b"\0", b"0"])
        elif draw.random() < 0.4:
            del data[place : place + draw.randrange(1, 4)]
        else:
            data[place] = draw.choice(b"\0\t\n\r :/5aA\x7f\xff")
        if not data:
            return
    found, _ = read(bytes(data))
    others, refused = read_by_h11(bytes(data))
    assert found[: len(others)] == others[: len(found)]
    assert len(found) <= len(others) or refused


def chunked(*sizes: int) -> bytes:
    chunks = b"".join(b"%x\r\n%b\r\n" % (size, b"c" * size) for size in sizes)
    return b"POST /c HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n"


@settings(deadline=None, derandomize=True, max_examples=50)
@given(st.lists(st.integers(1, 40), max_size=6), st.integers(1, 30))
@example([1] * 300, 7)
def test_chunks(sizes: list[int], step: int) -> None:
    data = chunked(*sizes)
    expected = [("POST", "/c", b"c" * sum(sizes))]
    assert read(data)[0] == expected == read_by_h11(data)[0]
    assert read(*(data[at : at + step] for at in range(0, len(data), step)))[0] == expected


def test_what_follows_chunks_at_once_is_left_to_another_connection() -> None:
    assert read(chunked(5) + GET + b"\r\n") == ([("POST", "/c", b"ccccc")], "closed")
    assert [path for _, path, _ in read(chunked(5), GET + b"\r\n")[0]] == ["/c", "/"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "400 a request names one host"),
        (GET + HOST + b"\r\n", "400 a request names one host"),
        (GET + b"Transfer-Encoding: gzip, chunked\r\n\r\n", "501 of the transfer encodings only chunked is known"),
        (GET + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n", "400 this is not an HTTP/1.1 request: "),
        (GET + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", "400 this is not an HTTP/1.1 request: "),
        (GET + b"Content-Length: 3000\r\n\r\n", "413 a body may take 2000 bytes"),
        (GET + b"Content-Length: +3\r\n\r\nabc", "400 this is not an HTTP/1.1 request: "),
        (chunked(1001, 1001), "413 a body may take 2000 bytes"),
        (GET + b"X: " + b"x" * MAX_HEAD_BYTES, "431 a head may take 16384 bytes"),
        (GET + b"X: " + b"x" * MAX_HEAD_BYTES + b"\r\n\r\n", "431 a head may take 16384 bytes"),
        (GET + b" folded: 1\r\n\r\n", "400 this is not an HTTP/1.1 request: "),
        (GET + b"X : 1\r\n\r\n", "400 this is not an HTTP/1.1 request: "),
        (GET + b"X: a\0b\r\n\r\n", "400 this is not an HTTP/1.1 request: "),
        (b"GET /HTTP/1.1\r\n" + HOST + b"\r\n", "505 HTTP/1.1 is spoken here"),
        (b"\x16\x03\x01\x02\0\x01", "400 this is not an HTTP/1.1 request: it does not begin with a method"),
        (GET + b"Upgrade: x\r\nConnection: upgrade\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
         "400 a request with a chunked body cannot offer another protocol"),
    ],
)  # fmt: skip
def test_what_is_refused(data: bytes, said: str) -> None:
    found, why = read(data)
    assert found == [] and why.startswith(said)


def test_an_offer_of_another_protocol_is_not_taken() -> None:
    """As clients of HTTP/2 make it with their first request."""
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
    first = b"POST /1 HTTP/1.1\r\n" + HOST + offer + b"Content-Length: 3\r\n\r\nabc"
    assert read(first + GET + offer + b"\r\n" + GET + b"\r\n") == (
        [("POST", "/1", b"abc"), ("GET", "/", b""), ("GET", "/", b"")],
        "",
    )


def test_older_clients_get_one_answer() -> None:
    assert read(b"GET / HTTP/1.0\r\n\r\n" + GET + b"\r\n") == ([("GET", "/", b"")], "closed")
    assert read(GET + b"Connection: close\r\n\r\n" + GET + b"\r\n") == ([("GET", "/", b"")], "closed")
