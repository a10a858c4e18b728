"""The wall clock jumps by a year, forward and back: nobody is disconnected, nothing is removed by age."""

from pathlib import Path
from typing import Any

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from tests.kit.waiting import wait_for

from .checker import History, read_back
from .traffic import PARTITIONS, SETTINGS, Traffic, pass_time

_LIBRARIES = [path for place in ("/usr/lib", "/usr/local/lib") for path in Path(place).glob("**/libfaketime.so.1")]
pytestmark = [pytest.mark.skipif(not _LIBRARIES, reason="libfaketime is not installed"), pytest.mark.slow]

SEED = 17
TOPIC = "orders"
YEAR = 365 * 24 * 3600
JUMPS = {"forward": f"+{YEAR}", "back": f"-{YEAR}"}
CHECKS = {
    "EDGEBROKER_STORAGE_RETENTION_MS": str(3600_000),
    "EDGEBROKER_LIMITS_HEARTBEAT_MS": "300",
    "EDGEBROKER_LIMITS_IDLE_TIMEOUT_MS": "1000",
}


@pytest.mark.parametrize("jump", JUMPS)
def test_a_jump_changes_nothing(tmp_path: Path, jump: str) -> None:
    clock = tmp_path / "clock"
    clock.write_text("+0\n")
    environment = {
        "LD_PRELOAD": str(_LIBRARIES[0]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    broker = BrokerProcess(tmp_path / "data", settings=SETTINGS | CHECKS, environment=environment)
    history = History()
    broker.start()
    try:
        with Traffic(broker, history, TOPIC, seed=SEED) as traffic:
            wait_for(lambda: _node(broker, "storage")["rolls"] > PARTITIONS, "segments are sealed", 20.0)
            opened = _node(broker, "counters")["connections_opened"]
            set_clock(clock, JUMPS[jump])
            wait_for(lambda: _node(broker, "storage")["clock"] != "plausible", "the jump is noticed", 10.0)
            # Longer than any timeout of this broker.
            pass_time(2.0)
            traffic.acked(50)
            assert _node(broker, "storage")["removed_segments"] == 0
            assert _node(broker, "counters")["connections_opened"] == opened
            assert _node(broker, "counters")["idle_timeouts"] == 0
            traffic.drain()
        history.check(TOPIC, read_back(broker, TOPIC), f"seed {SEED}")
        assert broker.stop() == 0
        # The clock is right again at the next start: before what was sealed, or after what was sealed in the past.
        set_clock(clock, "+0")
        broker.start()
        history.check(TOPIC, read_back(broker, TOPIC), f"seed {SEED}", retention=jump == "back")
    finally:
        broker.kill()


def set_clock(clock: Path, offset: str) -> None:
    temporary = clock.with_suffix(".new")
    temporary.write_text(f"{offset}\n")
    temporary.replace(clock)


def _node(broker: BrokerProcess, part: str) -> dict[str, Any]:
    found: dict[str, Any] = call(broker.admin, "GET", "/v1/node")[part]
    return found
