"""The tree of test_chaos.py for hours: little traffic, a fault now and then, readers that come and go.

After every cycle all promises of test_chaos.py must hold, and no node may have grown: its memory, its descriptors and
its disk stay within what meter.py and retention allow. `make soak`; EB_SOAK_HOURS says how long (fractions are
allowed), EB_SOAK_SEED with which seed. A line per cycle is printed.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from edgebroker.cli.admin_client import call

from .chaos import KINDS, Chaos, draw
from .checker import History
from .fleet import Fleet
from .meter import Meter
from .test_chaos import REST_SECONDS
from .traffic import CLOCK, PARTITIONS
from .users import Users
from .wires import unavailable

HOURS = float(os.environ.get("EB_SOAK_HOURS", "0"))
SEED = int(os.environ.get("EB_SOAK_SEED", "0")) or 20250310
REASON = unavailable() if HOURS else "takes hours: make soak"
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON or "available"), pytest.mark.slow]

TOPIC = "orders"
CYCLE_SECONDS, PAUSE_SECONDS = 45.0, 6.0
RETENTION_BYTES, SEGMENT_BYTES = 1 << 20, 64 << 10
# The logs with a segment more than retention asks for and the one being written. Beside them: the reserve of 8 MiB,
# space taken in advance for what is written next, indexes, meta.db and its journal, copies of damaged places.
MOST_DISK_BYTES = PARTITIONS * (RETENTION_BYTES + 3 * SEGMENT_BYTES) + (16 << 20)
# The others live from the beginning to the end, so that what leaks slowly is seen.
RESTARTABLE = ("l3", "pos")


def test_nothing_grows_and_everything_holds(tmp_path: Path) -> None:
    history, rng = History(), random.Random(SEED)
    with Fleet(tmp_path) as fleet:
        new = {"name": TOPIC, "partitions": PARTITIONS, "retention_bytes": RETENTION_BYTES}
        call(fleet["root"].admin, "POST", "/v1/topics", {**new, "segment_bytes": SEGMENT_BYTES})
        fleet.settle(TOPIC, 30.0)
        meter = Meter(fleet, MOST_DISK_BYTES)
        begun, cycle = CLOCK.monotonic(), 0
        while CLOCK.monotonic() - begun < HOURS * 3600:
            cycle += 1
            line = _cycle(fleet, history, meter, cycle, rng.randrange(1 << 30))
            print(f"{(CLOCK.monotonic() - begun) / 60:.1f} min, cycle {cycle}: {line}", flush=True)
        fleet.stop()
        assert not (found := fleet.differences(TOPIC)), found


def _cycle(fleet: Fleet, history: History, meter: Meter, cycle: int, seed: int) -> str:
    schedule = draw(seed, CYCLE_SECONDS, kinds=KINDS, pause=PAUSE_SECONDS, restartable=RESTARTABLE)
    chaos = Chaos(fleet, schedule, seed=seed, topic=TOPIC)
    before = sum(history.sent.values())
    try:
        with Users(fleet, history, TOPIC, seed=seed, name=str(cycle)) as users:
            users.begin()
            chaos.run(users.churn)
            chaos.over()
            rest = users.rest(REST_SECONDS)
            users.check(retention=True)
            users.forget()
            shutil.rmtree(users.directory)
        fleet.settle(TOPIC, REST_SECONDS)  # damage that a restart has just found is still to be repaired
        found = fleet.confessions() + meter.read()
        assert not found, found
    except BaseException as error:
        error.add_note(f"EB_SOAK_SEED={SEED}, cycle {cycle} with {seed}, logs in {fleet.directory}\n{chaos.story}")
        raise
    # What retention has removed by now is checked for the last time.
    history.forget(TOPIC, {part["partition"]: part["log_start"] for part in fleet["root"].partitions(TOPIC)})
    records = sum(history.sent.values()) - before
    return f"{records} records, {dict(chaos.counts)}, at rest after {rest:.1f} s; {meter}"
