"""The brokers that a client may use, as its `server` argument lists them: the first is the preferred one."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from edgebroker.common.errors import ArgumentError

PORT = 7420
UNIX = "unix:"
MOST_SERVERS = 16
# As Linux has it (sockaddr_un).
MOST_PATH_BYTES = 107


class Server:
    """HOST:PORT of one broker, or unix:PATH of one on this machine; str() shows it."""

    def __init__(self, host: str, port: int, path: str = "") -> None:
        self.host, self.port, self.path = host, port, path

    def __str__(self) -> str:
        if self.path:
            return f"{UNIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Servers:
    """Which broker to use now. Belongs to the I/O thread.

    Raises ArgumentError for a text that is not a list of addresses.
    """

    def __init__(self, text: str) -> None:
        self._all = parse_servers(text)
        self._rank = self._failures = 0

    @property
    def current(self) -> Server:
        return self._all[self._rank]

    @property
    def better(self) -> Sequence[Server]:
        """The ones before the current one."""
        return self._all[: self._rank]

    @property
    def several(self) -> bool:
        return len(self._all) > 1

    def reached(self) -> None:
        self._failures = 0

    def go_on(self) -> bool:
        """The current one is of no use: take the next. True when all of them were tried, and it is time for a pause."""
        self._failures += 1
        self._rank = (self._rank + 1) % len(self._all)
        return self._failures % len(self._all) == 0

    def use(self, server: Server) -> None:
        self._rank, self._failures = self._all.index(server), 0


def parse_servers(text: str) -> list[Server]:
    """The servers of "HOST:PORT,HOST:PORT,...". The port may be left out; an IPv6 address with a port has brackets; a
    broker of this machine may be unix:PATH. Raises ArgumentError."""
    found = [_parse(text, part.strip()) for part in text.split(",")]
    if len(found) > MOST_SERVERS:
        raise ArgumentError(f"{len(found)} servers are too many; name {MOST_SERVERS} at most")
    return found


def _parse(text: str, part: str) -> Server:
    if part.startswith(UNIX) and not part.startswith(f"{UNIX}//"):
        path = part.removeprefix(UNIX)
        if not path or len(path.encode()) > MOST_PATH_BYTES or "\0" in path:
            raise ArgumentError(
                f"server {text!r}: write unix:PATH, the path of a socket (listen.unix) with {MOST_PATH_BYTES} bytes at "
                "most"
            )
        return Server("", 0, path)
    scheme, separator, rest = part.partition("://")
    if separator:
        address = rest.partition("/")[0] or f"127.0.0.1:{PORT}"
        raise ArgumentError(f"server {text!r}: {scheme}:// does not belong there; write {address}")
    host, port = part, ""
    if part.startswith("["):
        host, bracket, port = part[1:].partition("]")
        if not bracket or (port and not port.startswith(":")) or not _is_ipv6(host):
            raise _not_an_address(text)
        port = port[1:] if port else str(PORT)
    elif part.count(":") == 1:
        host, _, port = part.partition(":")
    elif not _is_ipv6(part) and ":" in part:
        raise _not_an_address(text)
    else:
        port = str(PORT)
    if not host or any(sign.isspace() or sign in "/@" for sign in host):
        raise _not_an_address(text)
    if not (port.isascii() and port.isdigit() and 0 < int(port[:6]) < 65536):
        raise _not_an_address(text)
    return Server(host, int(port))


def _is_ipv6(text: str) -> bool:
    try:
        return ipaddress.ip_address(text.partition("%")[0]).version == 6
    except ValueError:
        return False


def _not_an_address(text: str) -> ArgumentError:
    return ArgumentError(
        f"server {text!r} is not an address; write HOST or HOST:PORT, such as 127.0.0.1:{PORT} or [::1]:{PORT}, "
        "several with commas between"
    )
