"""Refreshes interrupted at every step: what is visible is always the old or the new data, and READY comes once.

A consumer process with a store of its own stops at each step (refresher.py); there it or the broker is killed. The
broker is also killed in the very write that stores the refresh or its end. EB_FAULTS_FULL=1 takes every combination.
"""

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.producer import Producer
from edgebroker.common.errors import EdgeBrokerError, UnreachableError
from tests.kit.waiting import wait_for

from . import shim
from .refresher import STEPS, Store
from .traffic import CLOCK, SETTINGS

pytestmark = pytest.mark.slow

FULL = os.environ.get("EB_FAULTS_FULL") == "1"
GROUP, TOPIC = "mirrors", "stock"
KEYS, WINDOW = 30, 60
SECONDS = 20.0
ATTEMPTS = 8
BROKER = SETTINGS | {"EDGEBROKER_LOG_LEVEL": "warning", "EDGEBROKER_LIMITS_HEARTBEAT_MS": "200"}
_ROOT = Path(__file__).parents[2]


class World:
    """A broker, a topic of one partition, and the consumer process with its store."""

    def __init__(self, directory: Path, kind: str, rules: list[str]) -> None:
        self.kind, self.switch = kind, directory / "switch"
        data = directory / "data"
        environment = shim.environment(rules, data, self.switch) if rules else {}
        self.broker = BrokerProcess(data, settings=BROKER, environment=environment)
        self._path, self._log = directory / "store.db", directory / "refresher.log"
        self.store = Store(self._path)
        self.records: dict[int, tuple[str, str | None]] = {}
        self._marks: set[str] = set()
        self._reports: queue.Queue[tuple[subprocess.Popen[str], str, str]] = queue.Queue()
        self._consumer: subprocess.Popen[str] | None = None
        self.broker.start()
        call(self.broker.admin, "POST", "/v1/topics", {"name": TOPIC, "kind": kind})

    # ---- the consumer ----

    def consume(self) -> None:
        """Start the consumer process."""
        options = {"server": self.broker.server, "topic": TOPIC, "group": GROUP}
        arguments = json.dumps({**options, "store": str(self._path), "window": WINDOW})
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        with self._log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.refresher", arguments],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
            )
        self._consumer = process
        threading.Thread(target=self._listen, args=(process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        with process.stdout as lines:
            for line in lines:
                _, step, reset_id = line.split()
                self._reports.put((process, step, reset_id))

    def report(self) -> tuple[str, str] | None:
        """The step at which the consumer stands still now, and of which refresh; None when it is at work."""
        try:
            process, step, reset_id = self._reports.get(timeout=0.01)
        except queue.Empty:
            return None
        return (step, reset_id) if process is self._consumer else None

    def go(self) -> None:
        assert self._consumer is not None
        assert self._consumer.stdin is not None
        try:
            print("go", file=self._consumer.stdin, flush=True)
        except BrokenPipeError:
            raise AssertionError(f"the consumer ended: {self._log.read_text()[-2000:]}") from None

    def kill_consumer(self) -> None:
        process, self._consumer = self._consumer, None
        if process is not None:
            process.kill()
            process.wait()
            assert process.stdin is not None
            process.stdin.close()

    # ---- records and rows ----

    def publish(self, count: int) -> None:
        first = len(self.records)
        with Producer(self.broker.server, client_id="keeper", timeout=30.0) as producer:
            for n in range(first, first + count):
                value = None if self.kind == "table" and n % 11 == 0 else f"{n}"
                key = f"k{n % KEYS}" if self.kind == "table" else ""
                sent = producer.send(
                    TOPIC, value.encode() if value is not None else None, key.encode() if key else None, partition=0
                )
                self.records[sent.result(SECONDS)] = (key, value)

    def rows(self, next_offset: int) -> dict[str, str]:
        """What a store holds that has taken over all records before an offset."""
        found: dict[str, str] = {}
        for offset, (key, value) in sorted(self.records.items()):
            if offset >= next_offset:
                break
            found.pop(key, None)
            if value is not None:
                found[key or str(offset)] = value
        return found

    def mark(self) -> None:
        """Put a row into the visible store that does not belong there: the next refresh removes it."""
        self._marks &= self.store.visible().rows.keys()
        name = f"mark {len(self._marks)}"
        self._marks.add(name)
        self.store.add(name)

    def check(self, reset_id: str, target: int) -> bool:
        """What is visible is the old data, with the mark, or the new data without; True for the new."""
        rows, shown, next_offset, switches = self.store.visible()
        new = shown == reset_id
        marks = set() if new else self._marks
        assert rows.keys() - marks == self.rows(next_offset).keys(), f"{new}, up to {next_offset}"
        assert {key: value for key, value in rows.items() if key not in marks} == self.rows(next_offset)
        assert marks <= rows.keys()
        if new:
            assert next_offset >= target
        assert switches.count(reset_id) == int(new)
        return new

    # ---- the group ----

    def line(self) -> dict[str, Any]:
        groups = call(self.broker.admin, "GET", "/v1/groups")["groups"]
        found = [line for group in groups if group["name"] == GROUP for line in group["partitions"]]
        return dict(found[0]) if found else {"committed": -1, "durable_end": 0, "refresh": None}

    def refresh(self) -> dict[str, Any]:
        """Ask for one; how it stands. Raises EdgeBrokerError."""
        answer = call(self.broker.admin, "POST", f"/v1/groups/{GROUP}/refresh", {"topic": TOPIC})
        return dict(answer["partitions"][0]["refresh"])

    def caught_up(self) -> None:
        """Wait until everything is acknowledged, so that the broker has nothing to write."""

        def done() -> bool:
            report = self.report()
            if report is not None:
                # The broker may be ready before the consumer has said that it sent it.
                assert report[0] == "ready"
                self.go()
            line = self.line()
            return bool(line["committed"] == line["durable_end"] and line["member"])

        wait_for(done, "the consumer comes to the end", SECONDS)

    def until_ready(
        self,
        reset_id: str,
        target: int,
        at_step: Callable[[str], bool],
        what: str,
        died: Callable[[], None] = lambda: None,
    ) -> None:
        """Let the refresh go on to READY. `at_step` may interrupt it; True: the consumer is another process now.
        `died` is called when the broker is gone, and starts it."""
        deadline = CLOCK.monotonic() + SECONDS
        shown = False
        while True:
            assert CLOCK.monotonic() < deadline, f"{what}: not ready: {self.line()}"
            report = self.report()
            if report is not None:
                assert report[1] == reset_id, f"{what}: {report}"
                assert self.check(reset_id, target) >= shown, f"{what}: the old data again"
                shown = self.check(reset_id, target)
                if not at_step(report[0]):
                    self.go()
                assert self.check(reset_id, target) >= shown, what
                continue
            try:
                refresh = self.line()["refresh"]
            except UnreachableError:
                died()
                continue
            assert refresh["reset_id"] == reset_id, what
            if refresh["state"] == "ready":
                break
        assert self.check(reset_id, target), what

    def __enter__(self) -> "World":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill_consumer()
        self.broker.kill()
        self.store.close()


def _cases(kind: str) -> list[tuple[str, str]]:
    victims = ("consumer", "broker", "both")
    if FULL:
        return [(step, victim) for step in STEPS for victim in victims]
    first = 0 if kind == "table" else 1
    return [(step, victims[(first + rank) % 2]) for rank, step in enumerate(STEPS)]


@pytest.mark.parametrize("kind", ["table", "stream"])
def test_a_refresh_goes_on_whoever_dies(tmp_path: Path, kind: str) -> None:
    with World(tmp_path, kind, []) as world:
        world.publish(100)
        world.consume()
        for step, victim in _cases(kind):
            world.caught_up()
            world.mark()
            world.publish(20)
            world.caught_up()
            asked = world.refresh()
            struck: list[str] = []

            def strike(at: str, step: str = step, victim: str = victim, struck: list[str] = struck) -> bool:
                if struck or at != step:
                    return False
                struck.append(at)
                if victim in ("consumer", "both"):
                    world.kill_consumer()
                if victim in ("broker", "both"):
                    world.broker.kill()
                    world.broker.start()
                if victim != "broker":
                    world.consume()
                return victim != "broker"

            world.until_ready(asked["reset_id"], asked["target"], strike, f"{kind}, {victim} killed at {step}")
            assert struck
            world.publish(5)
        world.caught_up()
        assert world.store.visible().rows == world.rows(1 << 40)


@pytest.mark.skipif(not shim.available(), reason="needs Linux and gcc")
@pytest.mark.parametrize("kind", ["table", "stream"])
@pytest.mark.parametrize(("rule", "stored"), [("*:meta.db:1:kill", False), ("sync:meta.db-wal:1:kill_after", True)])
def test_a_broker_that_dies_while_it_stores_a_refresh(tmp_path: Path, kind: str, rule: str, stored: bool) -> None:
    """In the transaction that stores the beginning, and in the one that stores READY: before it, and after it.

    Another transaction may be the one that is hit; then it is tried again.
    """
    with World(tmp_path, kind, [rule]) as world:

        def died() -> None:
            assert world.broker.process is not None
            assert world.broker.process.wait(SECONDS) == -9
            world.switch.unlink()
            world.broker.start()

        world.publish(100)
        world.consume()
        for _ in range(ATTEMPTS):
            world.caught_up()
            world.mark()
            world.switch.touch()
            with pytest.raises(EdgeBrokerError, match="no broker answers"):
                world.refresh()
            died()
            kept = world.line()["refresh"]
            if (kept is not None) == stored:
                break
        assert (kept is not None) == stored
        if not stored:
            world.caught_up()  # the consumer is back, and with it the group
        asked = world.refresh()
        assert kept is None or kept == asked
        states: list[str] = []

        def noted() -> None:
            died()
            states.append(world.line()["refresh"]["state"])
            assert len(states) <= ATTEMPTS, states

        def strike(at: str) -> bool:
            over = bool(states) and states[-1] == ("ready" if stored else "refreshing")
            if at == "switched" or (at == "begun" and states and not over):
                world.switch.touch()
            elif at == "ready" and world.switch.exists():
                noted()
            return False

        world.until_ready(asked["reset_id"], asked["target"], strike, f"{kind}, {rule}", noted)
        assert states[-1] == ("ready" if stored else "refreshing")
        world.publish(5)
        world.caught_up()
