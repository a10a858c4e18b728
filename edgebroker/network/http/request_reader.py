"""Bytes of a connection -> requests, one after the other: heads and bodies by httptools (llhttp), which is strict.

    feed(bytes) -> next() -> a head, its limit -> its body -> ParsedRequest, or what is wrong

The parser gets a head when it is whole, and the chunks of a body; a body of a known length is taken as it is. What
follows a request stays here until next() is called again; what follows chunks at once cannot be kept, so the connection
ends with that request. Beyond llhttp a request must name one host (RFC 9112, 3.2).
"""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import NamedTuple

import httptools

MAX_HEAD_BYTES = 16 << 10
END_OF_HEAD = b"\r\n\r\n"
NO_REQUEST = "this is not an HTTP/1.1 request"
_FIRST = frozenset(string.ascii_letters.encode() + b"\r\n")


class BadRequestError(Exception):
    """What a peer sent is no request that can be answered; nothing after it can be read."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


class ParsedRequest(NamedTuple):
    """Of a header that came several times the last one counts. `keeps`: the connection can take another request."""

    method: str
    target: str
    headers: dict[bytes, bytes]
    body: bytes
    keeps: bool
    version: str


class RequestReader:
    """`limit` tells how long the body of a request may be, from its method and target."""

    def __init__(self, limit: Callable[[str, str], int]) -> None:
        self._limit_of = limit
        self._data = bytearray()
        self._searched = 0
        self._body = bytearray()
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpRequestParser(self)
        self._target, self._headers, self._hosts = b"", dict[bytes, bytes](), 0
        self._left = 0
        self._whole = False
        self.in_body, self.limit = False, 0

    @property
    def size(self) -> int:
        """Bytes that are here and belong to no request yet."""
        return len(self._data) + len(self._body)

    def end(self) -> None:
        """The connection is over. The parser refers to this: what it holds would stay until the collector comes."""
        del self._parser
        self._data, self._body = bytearray(), bytearray()

    def feed(self, data: bytes) -> None:
        """Take bytes; empty lines before a request are none of it (RFC 9112, 2.2)."""
        if not self._data and not self.in_body and data[:1] in (b"\r", b"\n"):
            data = data.lstrip(b"\r\n")
        self._data += data

    def next(self) -> ParsedRequest | None:
        """The next request that is whole; None when more has to come. Raises BadRequestError."""
        try:
            if not self.in_body and not self._take_head():
                return None
            if not self._whole:
                self._take_body()
        except httptools.HttpParserCallbackError as error:
            if isinstance(error.__context__, BadRequestError):
                raise error.__context__ from None
            self._keeps = False  # on_message_begin: of what follows a part is lost
        except httptools.HttpParserError as error:
            raise BadRequestError(400, f"{NO_REQUEST}: {error}") from None
        if not self._whole:
            return None
        request = ParsedRequest(
            self._method, self._text(self._target), self._headers, bytes(self._body), self._keeps, self._version
        )
        self._body = bytearray()
        self._begin()
        return request

    def _take_head(self) -> bool:
        end = self._data.find(END_OF_HEAD, max(0, self._searched - len(END_OF_HEAD)))
        self._searched = len(self._data)
        if end > MAX_HEAD_BYTES or (end < 0 and len(self._data) > MAX_HEAD_BYTES):
            raise BadRequestError(431, f"a head may take {MAX_HEAD_BYTES} bytes")
        if self._data and self._data[0] not in _FIRST:
            raise BadRequestError(400, f"{NO_REQUEST}: it does not begin with a method")  # another protocol
        if end < 0:
            return False
        end += len(END_OF_HEAD)
        head = bytes(memoryview(self._data)[:end])
        del self._data[:end]
        self._searched = 0
        self._parse(head)
        self._check_head()
        return True

    def _check_head(self) -> None:
        if self._version not in ("1.1", "1.0"):
            raise BadRequestError(505, "HTTP/1.1 is spoken here")
        if self._version == "1.1" and self._hosts != 1:
            raise BadRequestError(400, "a request names one host")
        encoding = self._headers.get(b"transfer-encoding")
        if encoding is not None and encoding.lower() != b"chunked":
            raise BadRequestError(501, "of the transfer encodings only chunked is known")
        if encoding is not None and self._whole:
            raise BadRequestError(400, "a request with a chunked body cannot offer another protocol")
        self._left = int(self._headers.get(b"content-length", b"0"))
        self._whole = encoding is None and not self._left
        self.in_body = not self._whole
        self.limit = self._limit_of(self._method, self._text(self._target))
        self._check_size(self._left)

    def _take_body(self) -> None:
        if not self._left:
            chunks, self._data = bytes(self._data), bytearray()
            self._parse(chunks)
            return
        piece = memoryview(self._data)[: self._left]
        self._body += piece
        self._left -= len(piece)
        self._whole = not self._left
        count = len(piece)
        piece.release()
        del self._data[:count]

    def _parse(self, data: bytes) -> None:
        if data:
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserUpgrade:
                pass  # an offer to speak another protocol, which is not taken: the request counts (RFC 9110, 7.8)

    def _check_size(self, size: int) -> None:
        if size > self.limit:
            raise BadRequestError(413, f"a body may take {self.limit} bytes")

    @staticmethod
    def _text(data: bytes) -> str:
        return data.decode("latin-1")

    # ---- called by the parser ----

    def on_message_begin(self) -> None:
        if self._whole:
            raise ValueError

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        name = name.lower()
        self._hosts += name == b"host"
        self._headers[name] = value

    def on_headers_complete(self) -> None:
        parser = self._parser
        self._method, self._version = self._text(parser.get_method()), parser.get_http_version()
        self._keeps = parser.should_keep_alive()

    def on_body(self, body: bytes) -> None:
        self._check_size(len(self._body) + len(body))
        self._body += body

    def on_message_complete(self) -> None:
        self._whole = True
