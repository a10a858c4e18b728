"""A broker whose clock is sent ahead: `python -m benchmarks.leaping`, configured by its environment.

It prints its addresses, then reads a line with a number of seconds at a time, lets that much time pass, and says so.
Time passes one second in each turn of the loop: every timer runs when it is due, sockets are served in between, and a
week takes a minute or two. While nobody says anything it passes as usual.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

from edgebroker.broker.broker import Broker
from edgebroker.common.config import load_config
from edgebroker.common.runtime.clock import SystemClock


class LeapingClock(SystemClock):
    """The machine's clocks, some seconds ahead."""

    ahead = 0.0

    def monotonic(self) -> float:
        return super().monotonic() + self.ahead

    def wall_ms(self) -> int:
        return super().wall_ms() + int(self.ahead * 1000)


class LeapingBroker:
    """The other end of it: such a broker as a child process, with its data in `directory`."""

    def __init__(self, directory: Path, settings: dict[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        free = {"LISTEN_TCP": "127.0.0.1:0", "LISTEN_HTTP": "127.0.0.1:0", "NODE_DATA_DIR": str(directory)}
        environment = {**os.environ, **{f"EDGEBROKER_{key}": value for key, value in free.items()}, **settings}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.leaping"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        found = json.loads(self._line())
        self.server, self.admin, self.pid = found["tcp"], found["http"], self._process.pid

    def _line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()

    def leap(self, seconds: int) -> None:
        """Let that much time pass."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{seconds}\n")
        self._process.stdin.flush()
        if self._line() != "over\n":
            raise RuntimeError("the broker has ended")

    def resident(self) -> float:
        """MiB."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)

    def stop(self) -> None:
        """As SIGTERM does."""
        self._process.communicate(timeout=30.0)

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()


def obey(broker: Broker, clock: LeapingClock) -> None:
    """Let time pass as stdin says; its end stops the broker."""
    for line in sys.stdin:
        over = threading.Event()

        def leap(left: int, over: threading.Event = over) -> None:
            if left:
                clock.ahead += 1.0
                broker.loop.call_soon_threadsafe(lambda: leap(left - 1))
            else:
                over.set()

        broker.loop.call_soon_threadsafe(lambda left=int(line): leap(left))  # type: ignore[misc]
        over.wait()
        print("over", flush=True)
    broker.stop_threadsafe()


def main() -> None:
    config, clock = load_config(), LeapingClock()
    logging.basicConfig(level=config.log.level.upper())
    broker = Broker(config, clock)
    broker.start()
    found = {"tcp": broker.listeners.tcp_address, "http": broker.listeners.http_address}
    print(json.dumps({name: f"{host}:{port}" for name, (host, port) in found.items()}), flush=True)
    threading.Thread(target=obey, args=(broker, clock), daemon=True).start()
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    broker.run()


if __name__ == "__main__":
    main()
