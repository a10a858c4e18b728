"""A broker as a child process, for the demonstration, the self-test, benchmarks and tests."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from edgebroker.cli import environment as environments
from edgebroker.cli.admin_client import call
from edgebroker.common.errors import EdgeBrokerError, UnreachableError
from edgebroker.common.runtime.clock import SystemClock, sleep
from edgebroker.common.runtime.program import program

START_SECONDS = 20.0


class BrokerProcess:
    """`edgebroker serve` on free ports of `host`, with its data in `directory`. start() returns when it is ready.

    Later starts use the ports of the first one, so that clients find the broker again.
    """

    def __init__(
        self,
        directory: Path,
        *,
        settings: dict[str, str] | None = None,
        command: Sequence[str] = (),
        environment: dict[str, str] | None = None,
        arguments: Sequence[str] = (),
        host: str = "127.0.0.1",
    ) -> None:
        self.directory = directory
        self._settings = settings or {}
        self._command = list(command)
        self._environment = environment or {}
        self._arguments = list(arguments)
        self._listen = self._pipe = f"{host}:0"
        self._http = "127.0.0.1:0"
        self.process: subprocess.Popen[bytes] | None = None
        self.log_path = directory.with_name(directory.name + ".log")

    @property
    def server(self) -> str:
        return self._listen

    @property
    def admin(self) -> str:
        return self._http

    @property
    def pipe(self) -> str:
        """Where the nodes below reach it."""
        return self._pipe

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self) -> None:
        """Start, and wait until it listens. Raises EdgeBrokerError with the end of its log when it does not in time."""
        self.directory.mkdir(parents=True, exist_ok=True)
        ports = self.directory.with_name(self.directory.name + ".ports")
        ports.unlink(missing_ok=True)
        environment = environments.for_another_node({**self._environment, **self._settings})
        arguments = ["serve", "--data-dir", str(self.directory), "--ports-file", str(ports), *self._arguments]
        arguments += ["--listen", self._listen, "--http", self._http, "--pipe", self._pipe]
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [*self._command, *program(), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
            )
        clock = SystemClock()
        deadline = clock.monotonic() + START_SECONDS
        while clock.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            if ports.exists() and (text := ports.read_text()).endswith("\n"):
                found = json.loads(text)
                self._listen, self._http, self._pipe = found["tcp"], found["http"], found["pipe"]
                return
            sleep(0.002)
        self.kill()
        raise EdgeBrokerError(f"the broker did not start; the end of its log:\n{self.log_path.read_text()[-2000:]}")

    def ready(self) -> bool:
        try:
            call(self._http, "GET", "/readyz")
        except UnreachableError:
            return False
        return True

    def kill(self) -> None:
        """Send SIGKILL, like a crash, and wait for the end."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()

    def stop(self, timeout: float = 30.0) -> int:
        """Send SIGTERM and wait; the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout)

    def __enter__(self) -> BrokerProcess:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.stop()
        else:
            self.kill()
