"""Power cuts under load on a real ext4: at random moments, in a roll, while retention removes, after a group commit.

EB_POWER_CYCLES says how many (3), EB_POWER_SEED with which seed. EB_POWER_NOSYNC=1 makes the broker skip its
syncs: the same run must then fail and say how much was lost.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from tests.kit.waiting import wait_for

from . import shim
from .checker import History, check_groups, read_back
from .powercut import Disk, unavailable
from .traffic import CLOCK, SETTINGS, Traffic, pass_time

REASON = unavailable()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON or "available"), pytest.mark.slow]

CYCLES = int(os.environ.get("EB_POWER_CYCLES", "3"))
SEED = int(os.environ.get("EB_POWER_SEED", "5"))
NOSYNC = os.environ.get("EB_POWER_NOSYNC") == "1"
CUTS_PER_DISK = 3
TOPIC = "orders"
NEW_TOPIC = {"name": TOPIC, "partitions": 4, "segment_bytes": 64 << 10, "retention_bytes": 256 << 10}


def segments(disk: Disk) -> set[Path]:
    return set(disk.mount.glob("topics/*/*/*.log"))


def changed(disk: Disk, *, removed: bool) -> Callable[[], bool]:
    """A condition: a segment was begun, or removed, since now."""
    before = segments(disk)

    def holds() -> bool:
        now = segments(disk)
        return bool(before - now) if removed else bool(now - before)

    return holds


def moment(kind: str, disk: Disk, history: History, rng: random.Random) -> None:
    """Wait for the moment of the cut."""
    acks = len(history.acks)
    wait_for(lambda: len(history.acks) > acks, "a first acknowledgement", 10.0)
    if kind == "time":
        pass_time(rng.uniform(0.0, 0.8))
    elif kind == "checkpoint":
        stored = sum(history.consumers[0].stored.values())
        wait_for(lambda: sum(history.consumers[0].stored.values()) > stored, "a commit of the group", 10.0)
    else:
        wait_for(changed(disk, removed=kind == "retention"), kind, 20.0)


class Cuts:
    """One disk and the broker on it."""

    def __init__(self, disk: Disk, *, rules: list[str]) -> None:
        self.disk, self.history = disk, History()
        environment = shim.environment(rules, disk.mount) if rules else {}
        self.broker = BrokerProcess(disk.mount, settings=SETTINGS, environment=environment)
        self.broker.start()
        call(self.broker.admin, "POST", "/v1/topics", NEW_TOPIC)

    def cut(self, kind: str, rng: random.Random) -> None:
        with Traffic(self.broker, self.history, TOPIC, seed=rng.randrange(1 << 30)) as traffic:
            moment(kind, self.disk, self.history, rng)
            self.disk.cut(self.broker)
            self.broker.start()
            traffic.acked(1)
            traffic.drain()

    def check(self, context: str) -> int:
        content = read_back(self.broker, TOPIC)
        self.history.check(TOPIC, content, context, retention=True)
        check_groups(self.broker, self.history, TOPIC, content, context)
        assert not call(self.broker.admin, "GET", "/v1/node")["problems"], context
        return sum(part.durable_end for part in content.values())


def test_power_cuts_lose_nothing(tmp_path: Path) -> None:
    rng = random.Random(SEED)
    rules = ["sync::*:skip"] if NOSYNC else []
    done = records = acks = 0
    begun = CLOCK.monotonic()
    while done < CYCLES:
        with Disk(tmp_path / f"disk-{done}") as disk:
            cuts = Cuts(disk, rules=rules)
            try:
                for _ in range(min(CUTS_PER_DISK, CYCLES - done)):
                    kind = ("time", "roll", "retention", "checkpoint")[rng.choice((0, 0, 1, 2, 3))]
                    context = f"EB_POWER_SEED={SEED}, cut {done} ({kind})"
                    cuts.cut(kind, rng)
                    written = cuts.check(context)
                    done += 1
                assert cuts.broker.stop() == 0
                records += written
                acks += len(cuts.history.acks)
            finally:
                cuts.broker.kill()
    print(f"{done} cuts, {records} records, {acks} acknowledged, {CLOCK.monotonic() - begun:.0f} s, nothing lost")


@pytest.mark.skipif(not shim.available(), reason="needs gcc")
def test_without_syncs_records_are_lost(tmp_path: Path) -> None:
    """The proof that these cuts can tell: a broker that skips its syncs fails."""
    with Disk(tmp_path / "disk") as disk:
        cuts = Cuts(disk, rules=["sync::*:skip"])
        try:
            history = cuts.history
            with Traffic(cuts.broker, history, TOPIC, seed=SEED) as traffic:
                wait_for(lambda: len(history.acks) > 200, "acknowledgements", 10.0)
                for writer in traffic.writers:
                    writer.drop()
                disk.cut(cuts.broker)
            cuts.broker.start()
            known = [line["name"] for line in call(cuts.broker.admin, "GET", "/v1/topics")["topics"]]
            lost = history.lost(TOPIC, read_back(cuts.broker, TOPIC) if TOPIC in known else {})
            print(f"without syncs: {len(lost)} of {len(history.acks)} acknowledged records lost")
            assert lost
        finally:
            cuts.broker.kill()
