"""Joins that are interrupted at every step, and a helper process that dies: one identity, one use of the token."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.broker.trust import helper as helpers
from edgebroker.broker.trust.helper import TrustHelper
from edgebroker.common.errors import UnreachableError
from edgebroker.common.runtime import durable
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.network.io.loop import Loop
from edgebroker.trust.directory import TrustDirectory
from edgebroker.trust.joining import join
from edgebroker.trust.messages import CreateFleet, Join, ListTokens, TokenInfo
from tests.kit.brokers import RunningBroker, running
from tests.kit.waiting import SECONDS, wait_for

pytestmark = pytest.mark.slow


class GoneError(Exception):
    """The process is no more."""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    directory = tmp_path_factory.mktemp("root")
    with running(directory / "data", {"trust.fleet": "acme"}) as node:
        wait_for(lambda: node.http("GET", "/v1/trust")[1]["node"], "the fleet is created")
        yield node


def token_of(root: RunningBroker) -> tuple[str, str]:
    """A token for one machine, and its id."""
    before = {one["id"] for one in root.http("GET", "/v1/trust/tokens")[1]["tokens"]}
    made = root.http("POST", "/v1/trust/tokens", {"tokens": [{"levels": ["pos"], "uses": 1}]})[1]["tokens"][0]
    [id] = {one["id"] for one in root.http("GET", "/v1/trust/tokens")[1]["tokens"]} - before
    return made, id


def used(root: RunningBroker, id: str) -> int:
    return int(next(one["used"] for one in root.http("GET", "/v1/trust/tokens")[1]["tokens"] if one["id"] == id))


def wanted(root: RunningBroker, token: str, uid: str) -> Join:
    return Join(
        addresses=["127.0.0.1:1", root.parent_address],
        token=token,
        fleet="",
        uid=uid,
        name="x",
        level="pos",
        region="eu",
    )


@pytest.mark.parametrize("call", ["rename", "fsync", "unlink"])
def test_a_join_that_ends_at_any_step(
    root: RunningBroker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Behind each rename, sync and removal in turn; the next attempt completes it."""
    real = getattr(os, call)
    for step in range(1, 50):
        token, id = token_of(root)
        uid = os.urandom(16).hex()
        directory = TrustDirectory(tmp_path / str(step))
        directory.write_token(token)
        left = [step]

        def gone(*arguments: object, left: list[int] = left) -> None:
            real(*arguments)
            left[0] -= 1
            if not left[0]:
                raise GoneError

        monkeypatch.setattr(durable.os, call, gone)
        try:
            join(directory, wanted(root, token, uid))
            over = True
        except GoneError:
            over = False
        finally:
            monkeypatch.setattr(durable.os, call, real)
        if not over:
            # What its node does when it starts again: with what is there.
            again = directory.read_token() if directory.identity() is None else ""
            join(directory, wanted(root, again, uid))
        found = directory.identity()
        assert found is not None and found[0].uid == uid
        assert used(root, id) == 1
        if over:
            break
    assert step > 1


def test_nobody_answers(tmp_path: Path, root: RunningBroker) -> None:
    token, _ = token_of(root)
    task = Join(addresses=["127.0.0.1:1"], token=token, fleet="", uid="a" * 32, name="x", level="pos", region="eu")
    with pytest.raises(UnreachableError, match=r"127.0.0.1:1: Connection refused"):
        join(TrustDirectory(tmp_path), task)
    nowhere = Join(addresses=[], token=token, fleet="", uid="a" * 32, name="x", level="pos", region="eu")
    with pytest.raises(UnreachableError, match="set pipe"):
        join(TrustDirectory(tmp_path), nowhere)


# ---- the helper process ----


class Told:
    """What a task led to."""

    def __init__(self) -> None:
        self.results: list[tuple[object, str]] = []

    def __call__(self, value: object, error: str, code: str) -> None:
        self.results.append((value, error))


@pytest.fixture
def helper(tmp_path: Path) -> Iterator[tuple[Loop, TrustHelper]]:
    loop = Loop(SystemClock())
    found = TrustHelper(loop, tmp_path)
    yield loop, found
    found.stop()
    loop.turn(0.0)
    loop.close()


def turn(loop: Loop, until: object) -> None:
    clock = SystemClock()
    end = clock.monotonic() + SECONDS
    while not until():  # type: ignore[operator]
        assert clock.monotonic() < end
        loop.turn(0.05)


def started(loop: Loop, found: TrustHelper, told: Told) -> subprocess.Popen[bytes]:
    """Its process, which has done a task."""
    found.do(ListTokens(), list[TokenInfo], told)
    turn(loop, lambda: told.results and found._process is not None)
    assert found._process is not None
    return found._process


def test_tasks_one_after_the_other(helper: tuple[Loop, TrustHelper]) -> None:
    loop, found = helper
    told = Told()
    found.do(ListTokens(), list[TokenInfo], told)
    found.do(CreateFleet(fleet="acme", uid="a" * 32, now_ms=SystemClock().wall_ms()), object, told)
    found.do(ListTokens(), list[TokenInfo], told)
    turn(loop, lambda: len(told.results) == 3)
    assert told.results == [(None, "certificates are not issued here; ask the root of the fleet"), (None, ""), ([], "")]


def test_a_helper_that_dies_is_started_again(helper: tuple[Loop, TrustHelper]) -> None:
    loop, found = helper
    told = Told()
    process = started(loop, found, told)
    os.kill(process.pid, signal.SIGSTOP)
    found.do(ListTokens(), list[TokenInfo], told)
    loop.turn(0.0)
    os.kill(process.pid, signal.SIGKILL)
    turn(loop, lambda: len(told.results) == 2)
    assert told.results[1] == (None, "the helper process ended")
    found.do(ListTokens(), list[TokenInfo], told)
    turn(loop, lambda: len(told.results) == 3)
    assert told.results[2] == told.results[0]


def test_a_helper_with_nothing_to_do_ends(helper: tuple[Loop, TrustHelper], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "IDLE_SECONDS", 0.05)
    loop, found = helper
    process = started(loop, found, Told())
    turn(loop, lambda: found._process is None)
    wait_for(lambda: process.poll() is not None, "it has ended")


def test_one_that_does_not_answer(helper: tuple[Loop, TrustHelper], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "END_SECONDS", 0.1)
    loop, found = helper
    told = Told()
    process = started(loop, found, told)
    os.kill(process.pid, signal.SIGSTOP)
    monkeypatch.setattr(helpers, "TASK_SECONDS", 0.1)
    found.do(ListTokens(), list[TokenInfo], told)
    turn(loop, lambda: len(told.results) == 2)
    assert told.results[1] == (None, "the helper process does not answer")
    wait_for(lambda: process.poll() is not None, "it was killed")


def test_too_many_tasks(helper: tuple[Loop, TrustHelper], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "MOST_WAITING", 2)
    loop, found = helper
    told = Told()
    for _ in range(3):
        found.do(ListTokens(), list[TokenInfo], told)
    turn(loop, lambda: len(told.results) == 3)
    assert told.results[0] == (None, "2 tasks wait for the helper process")


def test_a_helper_that_cannot_be_started(helper: tuple[Loop, TrustHelper], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(helpers, "program", lambda: ["/proc/none"])
    loop, found = helper
    told = Told()
    found.do(ListTokens(), list[TokenInfo], told)
    turn(loop, lambda: told.results)
    assert told.results == [(None, "the helper process cannot be started; see the log of the node")]
