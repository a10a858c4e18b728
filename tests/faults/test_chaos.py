"""Six nodes on hosts of their own under everything that machines, disks and lines do to them; then all must be well.

Producers publish at ROOT, a group of member processes reads at LOCAL, another one at POS. The faults follow from
EB_CHAOS_SEED and go on for EB_CHAOS_SECONDS (a few: this is then the self-test of `make chaos`). What must hold
afterwards: the tree comes to rest in time; every durable acknowledgement is in ROOT's log at its offset, offsets are
dense, nothing is there twice; each group saw every record in order; all mirrors hold ROOT's bytes; every node has the
live keys of a table that is changed, written as a snapshot and resynced meanwhile; no node is unwell.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgebroker.cli.admin_client import call

from .chaos import Chaos, draw
from .checker import History
from .fleet import Fleet
from .operators import TABLE, Operators
from .traffic import PARTITIONS
from .users import Users
from .wires import unavailable

REASON = unavailable()
pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON or "available"), pytest.mark.slow]

SECONDS = float(os.environ.get("EB_CHAOS_SECONDS", "6"))
SEED = int(os.environ.get("EB_CHAOS_SEED", "0")) or 20250309
TOPIC = "orders"
# A reconnect is tried after 30 s at the latest, a line that is dead without a word noticed after 57 s, a parent that is
# behind left after 30 s; repair tries again with growing pauses.
REST_SECONDS = 120.0


def test_everything_holds_whatever_happens(tmp_path: Path) -> None:
    history, schedule = History(), draw(SEED, SECONDS, pause=min(2.0, SECONDS / 10))
    with Fleet(tmp_path) as fleet:
        chaos = Chaos(fleet, schedule, seed=SEED, topic=TOPIC)
        try:
            rest = _run(fleet, chaos, history)
        except BaseException as error:
            error.add_note(f"EB_CHAOS_SEED={SEED} EB_CHAOS_SECONDS={SECONDS:g}, logs in {tmp_path}\n{chaos.story}")
            raise
    print(f"\nseed {SEED}: {dict(chaos.counts)}, {len(history.acks)} records, at rest after {rest:.1f} s")


def _run(fleet: Fleet, chaos: Chaos, history: History) -> float:
    """How long it took until all was at rest."""
    call(fleet["root"].admin, "POST", "/v1/topics", {"name": TOPIC, "partitions": PARTITIONS})
    fleet.settle(TOPIC, 30.0)
    with Users(fleet, history, TOPIC, seed=SEED) as users, Operators(fleet, seed=SEED) as operators:
        users.begin()

        def tend() -> None:
            users.tend()
            operators.tend()

        chaos.run(tend)
        chaos.over()
        operators.rest(REST_SECONDS)
        rest = users.rest(REST_SECONDS)
        users.check()
        operators.check()
    topics = [*users.topics, TABLE]
    for topic in topics:
        assert not (trouble := fleet.unsettled(topic)), trouble
    fleet.stop()
    for topic in topics:
        assert not (found := fleet.differences(topic)), found
    assert not (found := fleet.confessions()), found
    return rest
