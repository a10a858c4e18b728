"""The router answers for every route what has nothing to do with any: 400, 403, 404, 405, 415."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from edgebroker.broker.admin.listing import list_in_slices
from edgebroker.common.outcome import Outcome
from edgebroker.network.http.router import Call, Denial, Nothing, Route, Router
from edgebroker.network.http.server import MAX_BODY_BYTES, Request, Response
from tests.kit.clock import ManualClock, ManualScheduler


class Item(msgspec.Struct, forbid_unknown_fields=True):
    price: int


class Seen(msgspec.Struct):
    parameters: dict[str, str]
    query: dict[str, list[str]]
    body: Any = None


def echo(call: Call) -> None:
    call.answer(Seen(call.parameters, call.query, call.body), 201)


def refuse(call: Call) -> None:
    call.refuse(Outcome.NOT_FOUND, "there is no such item", headers=(("x-why", "gone"),))


ROUTES = [
    Route("GET", "/items", echo, Seen, "view"),
    Route("POST", "/items", echo, Seen, "alter", Item, 100),
    Route("GET", "/items/{name}", echo, Seen, "view"),
    Route("GET", "/items/best", refuse, Seen, "view"),
    Route("GET", "/files/{kind}/{path...}", echo, Seen, "view"),
    Route("PUT", "/items/{name}/tags/{tag}", echo, Seen, "alter"),
    Route("DELETE", "/items/{name}", lambda call: call.done(Outcome.OK, ""), Nothing, "alter"),
]


def ask(
    method: str, target: str, body: bytes = b"", kind: str = "application/json", rights: str = "view alter"
) -> Response:
    answers: list[Response] = []
    router = Router(
        ROUTES, lambda request, right: None if right in rights.split() else Denial(f"the right {right} is needed")
    )
    router.handle(Request(method, target, body, kind), answers.append)
    assert len(answers) == 1
    return answers[0]


def said(response: Response) -> Any:
    return json.loads(msgspec.json.encode(response.body))


def test_parts_of_the_path_and_the_query_are_handed_in() -> None:
    answer = ask("PUT", "/items/a%2Fb/tags/t?x=1&x=2&y=%20")
    assert answer.status == 201
    assert said(answer) == {
        "parameters": {"name": "a/b", "tag": "t"},
        "query": {"x": ["1", "2"], "y": [" "]},
        "body": None,
    }


def test_a_fixed_part_comes_before_a_named_one() -> None:
    answer = ask("GET", "/items/best")
    assert answer.status == 404
    assert said(answer) == {"error": "there is no such item", "code": "NOT_FOUND"}
    assert answer.headers == (("x-why", "gone"),)
    assert said(ask("GET", "/items/worst"))["parameters"] == {"name": "worst"}


@pytest.mark.parametrize("target", ["/", "/item", "/items/a/b", "/items/a/tags", "/items/a/tags/t/u"])
def test_there_is_no_such_path(target: str) -> None:
    answer = ask("GET", target)
    assert answer.status == 404
    assert target.split("?")[0] in said(answer)["error"]


@pytest.mark.parametrize(
    ("method", "target", "allow"),
    [
        ("DELETE", "/items", "GET, POST, HEAD"),
        ("POST", "/items/a", "DELETE, GET, HEAD"),
        ("GET", "/items/a/tags/t", "PUT"),
        ("HEAD", "/items/a/tags/t", "PUT"),
    ],
)
def test_another_method_is_told_which_ones_there_are(method: str, target: str, allow: str) -> None:
    answer = ask(method, target)
    assert answer.status == 405
    assert answer.headers == (("allow", allow),)
    assert allow in said(answer)["error"]


def test_head_is_get_without_the_body() -> None:
    assert ask("HEAD", "/items").status == 201  # the server leaves the body out


def test_a_right_that_is_missing() -> None:
    assert ask("GET", "/items", rights="view").status == 201
    answer = ask("POST", "/items", b'{"price": 1}', rights="view")
    assert answer.status == 403
    assert "alter" in said(answer)["error"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"price": "x"}', b'{"prize": 1}', b"[" * 50_000, b"\xff"])
def test_a_body_that_is_not_what_the_route_takes(body: bytes) -> None:
    answer = ask("POST", "/items", body)
    assert answer.status == 400
    assert said(answer)["error"].startswith("the body is not as expected")


@pytest.mark.parametrize("kind", ["application/json", "Application/JSON; charset=utf-8"])
def test_a_body_of_json(kind: str) -> None:
    assert said(ask("POST", "/items", b'{"price": 199}', kind))["body"] == {"price": 199}


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/jsonx"])
def test_a_body_that_is_not_json(kind: str) -> None:
    answer = ask("POST", "/items", b'{"price": 199}', kind)
    assert answer.status == 415
    assert kind in said(answer)["error"]


def test_the_limit_of_a_body_is_that_of_its_route() -> None:
    router = Router(ROUTES, lambda request, right: None)
    assert router.body_limit("POST", "/items?x=1") == 100
    for method, target in (("GET", "/items"), ("DELETE", "/items"), ("POST", "/nowhere")):
        assert router.body_limit(method, target) == MAX_BODY_BYTES


def test_done_without_a_failure_is_an_empty_object() -> None:
    answer = ask("DELETE", "/items/a")
    assert (answer.status, said(answer)) == (200, {})


class Listed:
    def __init__(self) -> None:
        self.partitions: list[int] = []


def test_a_long_list_is_made_in_slices() -> None:
    """Here the time of a slice is over with the first object and with every hundredth."""
    clock = ManualClock()
    scheduler, found = ManualScheduler(clock), list[list[Listed]]()

    def rendered() -> Iterator[object]:
        for topic in range(3):
            yield Listed()
            for number in range(100):
                clock.advance(1.0 if number == 99 else 0.0)
                yield topic * 1000 + number

    list_in_slices(scheduler, rendered(), Listed, found.append)
    assert not found, "the time of the first slice is over"
    while not found:
        scheduler.turn()
    assert [one.partitions for one in found[0]] == [
        [topic * 1000 + number for number in range(100)] for topic in range(3)
    ]


@pytest.mark.parametrize(
    ("target", "parameters"),
    [
        ("/files/css/a.css", {"kind": "css", "path": "a.css"}),
        ("/files/css/a/b%20c/d.css?x=1", {"kind": "css", "path": "a/b c/d.css"}),
        ("/files/css", {"kind": "css", "path": ""}),
        ("/files/css/..%2f..%2fetc", {"kind": "css", "path": "../../etc"}),
    ],
)
def test_the_rest_of_a_path(target: str, parameters: dict[str, str]) -> None:
    found = ask("GET", target)
    assert found.status == 201
    assert found.body == Seen(parameters, {"x": ["1"]} if "?" in target else {})


def test_the_rest_of_a_path_comes_last() -> None:
    routes = [Route("GET", "/{path...}", refuse, None, "view"), *ROUTES]
    answers: list[Response] = []
    router = Router(routes, lambda request, right: None)
    for target in ("/items", "/items/x", "/other", "/"):
        router.handle(Request("GET", target, b"", "", "", "", "", "", "unix"), answers.append)
    assert [one.status for one in answers] == [201, 201, 404, 404]
    assert [dict(one.headers).get("x-why") for one in answers] == [None, None, "gone", "gone"]
