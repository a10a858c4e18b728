"""Addresses of brokers: what is taken, what is refused and how, and which broker is used next."""

from __future__ import annotations

import pytest

from edgebroker.client.servers import Servers, parse_servers
from edgebroker.common.errors import ArgumentError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("127.0.0.1:7420", ["127.0.0.1:7420"]),
        ("localhost", ["localhost:7420"]),
        ("hub-1.example.com:7000", ["hub-1.example.com:7000"]),
        ("[::1]:7420", ["[::1]:7420"]),
        ("[::1]", ["[::1]:7420"]),
        ("::1", ["[::1]:7420"]),
        ("fe80::1%eth0", ["[fe80::1%eth0]:7420"]),
        ("a:1, b ,[::1]:3", ["a:1", "b:7420", "[::1]:3"]),
    ],
)
def test_what_is_an_address(text: str, shown: list[str]) -> None:
    assert [str(server) for server in parse_servers(text)] == shown


@pytest.mark.parametrize(
    "text",
    [
        "", " ", ":", ":7420", "a:", "a:0", "a:65536", "a:1e3", "a:²", "a:7420:1", "[::1", "[::1]7420", "[a]:7420",
        "a b", "a,,b", "a,", "user@a:7420", "a/b", "a:99999999999999999999",
    ],
)  # fmt: skip
def test_what_is_not(text: str) -> None:
    with pytest.raises(ArgumentError, match="is not an address; write HOST or HOST:PORT, such as"):
        parse_servers(text)


@pytest.mark.parametrize(
    ("text", "instead"),
    [("http://127.0.0.1:7421/v1", "127.0.0.1:7421"), ("tcp://hub:7420", "hub:7420"), ("https://", "127.0.0.1:7420")],
)
def test_a_url_is_none(text: str, instead: str) -> None:
    with pytest.raises(ArgumentError, match=f"does not belong there; write {instead}$"):
        parse_servers(text)


def test_too_many() -> None:
    with pytest.raises(ArgumentError, match="17 servers are too many; name 16 at most"):
        parse_servers(",".join(["a"] * 17))


def test_which_is_next() -> None:
    servers = Servers("a,b,c")
    assert (str(servers.current), list(servers.better), servers.several) == ("a:7420", [], True)
    assert [servers.go_on() for _ in range(3)] == [False, False, True]
    assert servers.go_on() is False
    servers.reached()
    assert (str(servers.current), [str(one) for one in servers.better]) == ("b:7420", ["a:7420"])
    assert [servers.go_on() for _ in range(3)] == [False, False, True]
    servers.use(servers.better[0])
    assert str(servers.current) == "a:7420"
    assert not Servers("a").several
    assert Servers("a").go_on() is True
