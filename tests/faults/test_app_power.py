"""Power cuts of an application on a real ext4, while records come and topics are loaded again.

After each cut its database, as the disk has it, is that of the records below the positions that it says, and the group
has passed nothing that it lacks. EB_APP_POWER_CYCLES says how many (3), EB_APP_POWER_SEED with which seed.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from tests.kit.waiting import wait_for

from .powercut import Disk, unavailable
from .test_app_kill import PARTITIONS, Publisher, Snapshot, Till, check_all, refresh
from .traffic import SETTINGS, pass_time

REASON = unavailable()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON or "available"), pytest.mark.slow]
CYCLES = int(os.environ.get("EB_APP_POWER_CYCLES", "3"))
SEED = int(os.environ.get("EB_APP_POWER_SEED", "7"))


def committed(broker: BrokerProcess) -> dict[int, int]:
    """Of partitions that are not loaded again: there it says how much of that is stored beside the view."""
    lines = call(broker.admin, "GET", "/v1/groups/till.till-7").get("partitions", [])
    return {
        line["partition"]: max(0, line["committed"])
        for line in lines
        if not line["refresh"] or line["refresh"]["state"] == "ready"
    }


def as_the_disk_has_it(till: Till, scratch: Path) -> Snapshot | None:
    """A copy, which SQLite recovers as the application does at its start."""
    shutil.rmtree(scratch, ignore_errors=True)
    if not till.path.exists():
        return None
    shutil.copytree(till.path.parent, scratch, ignore=shutil.ignore_patterns("*.sock"))
    (scratch / "app.db-shm").unlink(missing_ok=True)
    for name in ("app.db-wal", "app.db-shm"):
        (scratch / name).touch()
    return till.read(scratch / "app.db")


def test_power_cuts_tear_nothing(tmp_path: Path) -> None:
    rng, snapshots, refreshes = random.Random(SEED), list[Snapshot](), 0
    with (
        Disk(tmp_path / "disk") as disk,
        BrokerProcess(tmp_path / "data", settings=SETTINGS | {"EDGEBROKER_LOG_LEVEL": "warning"}) as broker,
    ):
        call(broker.admin, "POST", "/v1/topics", {"name": "prices", "partitions": PARTITIONS})
        till = Till(tmp_path, broker.server, disk.mount / "app")
        publisher = Publisher(broker.server)
        publisher.start()
        try:
            for _ in range(CYCLES):
                till.start()
                wait_for(lambda: till.read() is not None, "it has begun", 30.0)
                pass_time(rng.uniform(0.0, 1.5))
                if rng.random() < 0.5:
                    refreshes += refresh(broker)
                    pass_time(rng.uniform(0.0, 0.4))
                disk.cut(till)
                passed = committed(broker)
                found = as_the_disk_has_it(till, tmp_path / "copy")
                if found is None:
                    assert not any(passed.values()), "nothing was acknowledged that is not there"
                    continue
                snapshots.append(found)
                for partition, offset in passed.items():
                    assert offset <= found.positions.get(partition, 0), (SEED, passed, found.positions)
            count = check_all(broker, till, publisher, snapshots, f"EB_APP_POWER_SEED={SEED}")
            assert not list(disk.mount.rglob("*.corrupt-*"))
        finally:
            publisher.stop()
            till.kill()
    print(f"{CYCLES} cuts, {count} records, {refreshes} refreshes, {len(snapshots)} databases")
