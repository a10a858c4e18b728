"""The members of one group as child processes: started, killed, stopped, let go on and started again by a test."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.common.errors import UnreachableError
from tests.kit.waiting import wait_for

from .checker import History, read_back
from .group_checker import Journals, read_letters
from .traffic import CLOCK

_ROOT = Path(__file__).parents[2]


@dataclass
class MemberProcess:
    """One member: what it was told, its process now, and when it is let go on (0: it is not stopped)."""

    options: dict[str, Any]
    process: subprocess.Popen[bytes]
    runs: int = 1
    wake_at: float = 0.0

    @property
    def alive(self) -> bool:
        return self.process.poll() is None


class Crowd:
    """A group of members that read one topic; a context manager that lets none of them survive."""

    def __init__(self, directory: Path, broker: BrokerProcess, topic: str, group: str) -> None:
        self.broker, self.topic, self.group = broker, topic, group
        self._directory = directory / f"journals-{topic}"
        self._directory.mkdir()
        self.children: dict[str, MemberProcess] = {}
        self.problems: list[str] = []

    # ---- members ----

    def start(self, name: str, server: str = "", **options: Any) -> None:
        """Start a member; with a name that was used before, start that one again."""
        known = self.children.get(name)
        if known is not None:
            options = {**known.options, **options}
        else:
            options = {
                "server": server or self.broker.server,
                "topic": self.topic,
                "group": self.group,
                **options,
            }
        runs = known.runs + 1 if known is not None else 1
        journal = self._directory / f"{name}-{runs}"
        arguments = json.dumps({**options, "client_id": name, "journal": str(journal)})
        environment = {**os.environ, "PYTHONPATH": str(_ROOT)}
        with (self._directory / f"{name}-{runs}.log").open("wb") as log:
            command = [sys.executable, "-m", "tests.faults.member", arguments]
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment)
        self.children[name] = MemberProcess(options, process, runs)

    def names(self, *, stopped: bool = False) -> list[str]:
        """Those that run, and are (or are not) stopped."""
        return [name for name, child in self.children.items() if child.alive and bool(child.wake_at) is stopped]

    def kill(self, name: str) -> None:
        child = self.children[name]
        child.process.kill()
        child.process.wait()
        child.wake_at = 0.0

    def stop(self, name: str, seconds: float) -> None:
        """The process stands still, as if its machine hung, until tend() or wake() lets it go on."""
        child = self.children[name]
        child.process.send_signal(signal.SIGSTOP)
        child.wake_at = CLOCK.monotonic() + seconds

    def wake(self, name: str) -> None:
        child = self.children[name]
        child.process.send_signal(signal.SIGCONT)
        child.wake_at = 0.0

    def leave(self, name: str) -> None:
        """It closes its consumer and ends."""
        child = self.children[name]
        if child.wake_at:
            self.wake(name)
        journal = self._directory / f"{name}-{child.runs}"
        wait_for(lambda: not child.alive or " b\n" in self._text(journal), f"{name} has begun", 20.0)
        child.process.terminate()
        # One that a record killed at this very moment is no member that ended badly.
        if child.process.wait(20.0) not in (0, -signal.SIGKILL):
            self.problems.append(f"{name} ended with {child.process.returncode}: {self.log(name)}")

    def dismiss(self, name: str) -> None:
        """It is never started again."""
        self.kill(name)
        del self.children[name]

    def tend(self) -> None:
        """Start those again that a record killed, wake those that stood still for long enough."""
        for name, child in list(self.children.items()):
            if child.wake_at and CLOCK.monotonic() >= child.wake_at:
                self.wake(name)
            code = child.process.poll()
            if code == -signal.SIGKILL:
                self.start(name)
            elif code is not None and code != 0:
                self.problems.append(f"{name} ended with {code}: {self.log(name)}")
                self.start(name)

    def log(self, name: str) -> str:
        return self._text(self._directory / f"{name}-{self.children[name].runs}.log")[-2000:]

    @staticmethod
    def _text(path: Path) -> str:
        return path.read_text() if path.exists() else ""

    # ---- what became of it ----

    def journals(self) -> Journals:
        return Journals(path for path in sorted(self._directory.iterdir()) if path.suffix != ".log")

    def lines(self) -> list[dict[str, Any]]:
        """The group's partitions as the broker tells; [] while there is none."""
        try:
            groups = call(self.broker.admin, "GET", "/v1/groups")["groups"]
        except UnreachableError:
            return []
        found = [line for group in groups if group["name"] == self.group for line in group["partitions"]]
        return [line for line in found if line["topic"] == self.topic]

    def at_the_end(self) -> bool:
        """The group's place is the end of every partition that holds something."""
        lines = self.lines()
        return bool(lines) and all(line["committed"] == line["durable_end"] for line in lines if line["durable_end"])

    def come_to_the_end(self, seconds: float, context: object = "") -> None:
        """Wait until everything is acknowledged, starting members again that a record killed."""

        def done() -> bool:
            self.tend()
            return self.at_the_end()

        try:
            wait_for(done, "the group comes to the end", seconds)
        except TimeoutError as error:
            state = {name: child.process.poll() for name, child in self.children.items()}
            raise TimeoutError(f"{context}: {error}: {self.lines()}, {state}, {self.problems}") from None

    def check(self, history: History, context: object, *, faults: bool = True, retention: bool = False) -> Journals:
        """Everything that was published against everything that was handled. Raises AssertionError. `retention`: the
        beginning of a partition may have been removed."""
        content = read_back(self.broker, self.topic)
        history.check(self.topic, content, context, retention=retention)
        letters = read_letters(self.broker, self.topic, self.dead_letters())
        journals = self.journals()
        problems = self.problems + journals.problems(content, letters, faults=faults)
        assert not problems, f"{context}: {len(problems)} problems\n" + "\n".join(problems[:12])
        return journals

    def dead_letters(self) -> int:
        """How many there are."""
        name = f"{self.topic}.dlq"
        topics = call(self.broker.admin, "GET", "/v1/topics")["topics"]
        return sum(part["durable_end"] for line in topics if line["name"] == name for part in line["partitions"])

    def __enter__(self) -> "Crowd":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self.children):
            self.kill(name)
