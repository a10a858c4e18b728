"""A group of real member processes under faults of every kind: nothing is skipped, nothing is lost, order holds.

Brokers and members are killed, members hang, crash on a record, refuse records, never acknowledge; connections are cut
at any byte. EB_GROUP_CYCLES says how many faults (12), EB_GROUP_SEED with which seed.
"""

import os
import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.producer import Producer
from tests.kit.waiting import wait_for

from .checker import History
from .crowd import Crowd
from .group_checker import read_letters
from .member import POISON
from .proxy import Proxy
from .traffic import CLOCK, PARTITIONS, SETTINGS, Writer, pass_time, send_value

pytestmark = pytest.mark.slow

CYCLES = int(os.environ.get("EB_GROUP_CYCLES", "12"))
SEED = int(os.environ.get("EB_GROUP_SEED", "20250117"))
# A topic, and a group of fresh processes, for so many faults at a time.
CYCLES_PER_ROUND = 40
GROUP = "tills"
TIMEOUT_SECONDS = 1.0
MAX_ATTEMPTS = 3
DELIVERY = {
    "EDGEBROKER_DELIVERY_TIMEOUT_MS": str(int(TIMEOUT_SECONDS * 1000)),
    "EDGEBROKER_DELIVERY_MAX_ATTEMPTS": str(MAX_ATTEMPTS),
    "EDGEBROKER_DELIVERY_BACKOFF_MS": "50",
    "EDGEBROKER_DELIVERY_MAX_BACKOFF_MS": "200",
    "EDGEBROKER_LIMITS_HEARTBEAT_MS": "200",
    "EDGEBROKER_LIMITS_IDLE_TIMEOUT_MS": "2000",
    "EDGEBROKER_LOG_LEVEL": "warning",
}


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[BrokerProcess]:
    process = BrokerProcess(tmp_path / "data", settings=SETTINGS | DELIVERY)
    process.start()
    yield process
    process.kill()


class Faults:
    """What may happen to a crowd; each fault is named by its method."""

    def __init__(self, crowd: Crowd, proxy: Proxy, history: History, rng: random.Random) -> None:
        self.crowd, self.proxy, self.history, self.rng = crowd, proxy, history, rng
        self.counts: Counter[str] = Counter()
        self._poison = Producer(crowd.broker.server, client_id="poison", timeout=60.0)
        self._poisoned = history.sent[POISON]

    def one(self) -> str:
        kinds = [self.kill_broker, self.kill_member, self.stop_member, self.cut, self.poison, self.lazy, self.leave]
        kind: Callable[[], None] = self.rng.choices(kinds, [4, 3, 3, 4, 1, 1, 2])[0]
        self.counts[kind.__name__] += 1
        kind()
        return kind.__name__

    def kill_broker(self) -> None:
        self.crowd.broker.kill()
        pass_time(self.rng.choice((0.0, 0.3)))
        self.crowd.broker.start()

    def kill_member(self) -> None:
        names = self.crowd.names()
        if names:
            self.crowd.kill(self.rng.choice(names))

    def stop_member(self) -> None:
        """It hangs for longer than the delivery timeout, now and then for less."""
        names = self.crowd.names()
        if len(names) > 1:
            self.crowd.stop(self.rng.choice(names), TIMEOUT_SECONDS * self.rng.choice((0.3, 1.5, 2.0)))

    def cut(self) -> None:
        self.proxy.cut_all()

    def poison(self) -> None:
        partition = self.rng.randrange(PARTITIONS)
        send_value(self.history, self._poison, self.crowd.topic, partition, POISON, self._poisoned, 40)
        self._poisoned += 1

    def lazy(self) -> None:
        """A member that never acknowledges comes, or goes again."""
        if "lazy" in self.crowd.children:
            self.crowd.dismiss("lazy")
        else:
            self.crowd.start("lazy", acks=False, seed=self.rng.randrange(1 << 30))

    def leave(self) -> None:
        """A member ends as it should, and is started again."""
        names = self.crowd.names()
        if names:
            name = self.rng.choice(names)
            self.crowd.leave(name)
            self.crowd.start(name)

    def over(self) -> None:
        self.proxy.calm()
        if "lazy" in self.crowd.children:
            self.crowd.dismiss("lazy")
        self._poison.close(30.0)


def test_nothing_is_skipped_whatever_happens(broker: BrokerProcess, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    done = records = repeats = letters = cuts = 0
    counts: Counter[str] = Counter()
    while done < CYCLES:
        cycles = min(CYCLES_PER_ROUND, CYCLES - done)
        topic, history = f"sales-{done}", History()
        call(broker.admin, "POST", "/v1/topics", {"name": topic, "partitions": PARTITIONS})
        with (
            Proxy(broker.server, seed=rng.randrange(1 << 30), budget=(2_000, 300_000)) as proxy,
            Crowd(tmp_path, broker, topic, GROUP) as crowd,
        ):
            for name, options in (
                ("quick", {}),
                ("slow", {"pause": 0.01, "window": 50, "hang": 1.5 * TIMEOUT_SECONDS}),
                ("fussy", {"pause": 0.002, "refuse": 0.002}),
                ("small", {"window": 7}),
            ):
                crowd.start(name, proxy.server, seed=rng.randrange(1 << 30), **options)
            writers = [
                Writer(history, broker.server, f"p{rank}", topic, seed=rng.randrange(1 << 30), pause=0.03)
                for rank in range(2)
            ]
            faults = Faults(crowd, proxy, history, rng)
            context = f"EB_GROUP_SEED={SEED}"
            try:
                for cycle in range(cycles):
                    pass_time(rng.uniform(0.1, 0.6))
                    crowd.tend()
                    context = f"EB_GROUP_SEED={SEED}, fault {done + cycle}, {faults.one()}"
                for writer in writers:
                    writer.stop()
                faults.over()
                crowd.come_to_the_end(40.0, context)
            finally:
                for writer in writers:
                    writer.drop()
            for name in crowd.names():
                crowd.leave(name)
            # What was acknowledged at the end is still acknowledged after the next start.
            assert broker.stop() == 0
            broker.start()
            assert crowd.at_the_end(), f"{context}: {crowd.lines()}"
            assert not history.failures, f"{context}: {history.failures}"
            journals = crowd.check(history, context)
            letters += crowd.dead_letters()
        done += cycles
        records, repeats = records + journals.first_times, repeats + journals.repeats
        counts, cuts = counts + faults.counts, cuts + proxy.cuts
    print(f"{dict(counts)}, {cuts} cuts, {records} records, {repeats} handled again, {letters} dead letters")


def test_members_that_come_and_go_repeat_nothing(broker: BrokerProcess, tmp_path: Path) -> None:
    """Joining and leaving move partitions between members; without a fault nothing is handled twice."""
    history, rng = History(), random.Random(SEED)
    topic = "quiet"
    call(broker.admin, "POST", "/v1/topics", {"name": topic, "partitions": PARTITIONS})
    with Crowd(tmp_path, broker, topic, GROUP) as crowd:
        crowd.start("first", pause=0.002)
        writer = Writer(history, broker.server, "p", topic, seed=SEED, pause=0.01)
        try:
            for name in ("second", "third"):
                crowd.start(name, pause=0.002)
                wait_for(lambda: len(_holders(crowd)) == len(crowd.children), f"{name} gets a partition", 20.0)
            for name in ("first", "second"):
                pass_time(rng.uniform(0.1, 0.3))
                crowd.leave(name)
                crowd.start(name)
                wait_for(lambda: len(_holders(crowd)) == 3, f"{name} gets a partition again", 20.0)
            writer.stop()
            crowd.come_to_the_end(20.0)
        finally:
            writer.drop()
        for name in crowd.names():
            crowd.leave(name)
        journals = crowd.check(history, f"EB_GROUP_SEED={SEED}", faults=False)
    assert journals.first_times == len(history.acks)


@pytest.mark.parametrize("partitions", [1, 2])
def test_a_record_that_kills_its_handler_is_buried(broker: BrokerProcess, tmp_path: Path, partitions: int) -> None:
    """It dies once with others in flight, which counts for nobody, and then alone until the attempts are used up."""
    history, topic = History(), "poisoned"
    call(broker.admin, "POST", "/v1/topics", {"name": topic, "partitions": partitions})
    with Producer(broker.server, client_id="p") as producer:
        for n in range(200):
            send_value(history, producer, topic, n % partitions, "p", n, 60)
            if n == 100:
                send_value(history, producer, topic, 0, POISON, 0, 40)
    with Crowd(tmp_path, broker, topic, GROUP) as crowd:
        for name in ("a", "b"):
            crowd.start(name, often=1.0, pause=0.01)
        crowd.come_to_the_end(30.0)
        for name in crowd.names():
            crowd.leave(name)
        journals = crowd.check(history, f"EB_GROUP_SEED={SEED}")
        letters = read_letters(broker, topic, crowd.dead_letters())
        assert len(letters) == 1, letters
        (letter,) = letters
        assert (letter.origin, letter.headers["eb-dlq-attempts"]) == ((POISON, 0), str(MAX_ATTEMPTS))
        assert "disconnected" in letter.headers["eb-dlq-reason"]
        # Deaths in company come first: what was acknowledged last may not have left the process.
        (deaths,) = journals.poisoned.values()
        assert MAX_ATTEMPTS <= deaths <= 3 * MAX_ATTEMPTS
        assert journals.first_times == 200


def test_what_a_sleeper_acknowledges_late_changes_nothing(broker: BrokerProcess, tmp_path: Path) -> None:
    """It slept through the delivery timeout with records in hand; meanwhile another member got its partition."""
    history, topic = History(), "slept"
    call(broker.admin, "POST", "/v1/topics", {"name": topic, "partitions": 1})
    with Producer(broker.server, client_id="p") as producer:
        for n in range(400):
            send_value(history, producer, topic, 0, "p", n, 60)
    with Crowd(tmp_path, broker, topic, GROUP) as crowd:
        crowd.start("sleeper", window=40, pause=0.01)
        wait_for(lambda: crowd.journals().first_times > 50, "the first member is at work", 20.0)
        crowd.stop("sleeper", 1000.0)
        slept = crowd.journals().first_times
        crowd.start("heir", window=40, pause=0.01)
        wait_for(lambda: _holders(crowd) == {"heir"} and _handled_by(crowd, "heir") > 0, "the second one gets it", 20.0)
        # Both stand still: nothing moves the place but what the sleeper says when it wakes up.
        crowd.stop("heir", 1000.0)
        before, stale = crowd.lines()[0], _counter(broker, "stale_acks")
        begun = CLOCK.monotonic()
        crowd.wake("sleeper")
        wait_for(lambda: _revoked(tmp_path, topic, "sleeper"), "the first one learns of it", 20.0)
        after = crowd.lines()[0]
        if CLOCK.monotonic() - begun < TIMEOUT_SECONDS / 2 and after["member"]["client_id"] == "heir":
            assert (after["committed"], after["member"]["lease"]) == (before["committed"], before["member"]["lease"])
        print(f"asleep after {slept} records, {_counter(broker, 'stale_acks') - stale} stale acknowledgements")
        crowd.wake("heir")
        crowd.come_to_the_end(30.0)
        for name in crowd.names():
            crowd.leave(name)
        crowd.check(history, f"EB_GROUP_SEED={SEED}")
        assert crowd.dead_letters() == 0


def _holders(crowd: Crowd) -> set[str]:
    """The members that hold something for good: nothing of theirs is being revoked."""
    members = [line["member"] for line in crowd.lines() if line["member"]]
    return {member["client_id"] for member in members if not any(each["revoking"] for each in members)}


def _handled_by(crowd: Crowd, name: str) -> int:
    handled = crowd.journals().handled
    return sum(each.member.startswith(name) for found in handled.values() for each in found)


def _revoked(directory: Path, topic: str, name: str) -> bool:
    journal = directory / f"journals-{topic}" / f"{name}-1"
    return any(line.split(" ")[1] == "r" for line in journal.read_text().splitlines())


def _counter(broker: BrokerProcess, name: str) -> int:
    return int(call(broker.admin, "GET", "/v1/node")["counters"][name])
