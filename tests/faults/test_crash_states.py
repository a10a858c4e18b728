"""Every state a power cut may leave of a real broker's data directory, opened again by the real recovery.

The broker runs under the trace while a client publishes (rolls), consumes (checkpoints, group offsets) and retention
removes segments (identity); the client marks the trace with each acknowledgement it got. EB_CRASH_LIMIT says how many
states are looked at after each operation (4).
"""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from edgebroker.broker.broker import Broker
from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.config import load_config
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.storage.identity import read_identity
from edgebroker.storage.store import SegmentStore
from tests.kit.storage import Listener
from tests.kit.waiting import wait_for

from . import crashstates, shim
from .checker import Ack, History, PartitionContent, read_files, value_of
from .traffic import SETTINGS

pytestmark = [pytest.mark.skipif(not shim.available(), reason="needs Linux and gcc"), pytest.mark.slow]

LIMIT = int(os.environ.get("EB_CRASH_LIMIT", "4"))
SEED = int(os.environ.get("EB_CRASH_SEED", "11"))
TOPIC, GROUP, PARTITIONS = "orders", "readers", 2
NEW_TOPIC = {"name": TOPIC, "partitions": PARTITIONS, "segment_bytes": 64 << 10, "retention_bytes": 40 << 10}


class Recovered(NamedTuple):
    content: dict[int, PartitionContent]
    offsets: dict[int, int]
    corrupt_ranges: int


class Lab:
    """A traced broker and the directory that its states are made in, in memory where there is such a place."""

    def __init__(self, path: Path, memory: Path) -> None:
        self.root, self.trace, self.scratch = path / "data", path / "trace", memory / "state"
        self.history = History()
        self._path = path

    def workload(self, *rules: str, waves: int = 5) -> None:
        """Publish in waves until segments rolled and were removed, with a consumer that acknowledges."""
        environment = shim.environment(list(rules), self.root, trace=self.trace)
        # The trace sees files, not how a socket comes into being: keep the sockets out of the traced directory.
        sockets = {f"EDGEBROKER_LISTEN_{door}": str(self._path / f"{door}.sock") for door in ("SOCKET", "UNIX")}
        settings = {**SETTINGS, **sockets}
        broker = BrokerProcess(self.root, settings=settings, environment=environment)
        broker.start()
        try:
            call(broker.admin, "POST", "/v1/topics", NEW_TOPIC)
            self._mark(f"created {TOPIC}")
            with (
                Producer(broker.server, client_id="p", timeout=30.0) as producer,
                Consumer(broker.server, [TOPIC], GROUP, auto_ack=False) as consumer,
            ):
                for wave in range(waves):
                    self._publish(producer, wave)
                    self._consume(consumer)
                wait_for(lambda: _storage(broker)["removed_segments"] > 0, "retention removes a segment", 10.0)
                self._publish(producer, waves)
            assert _storage(broker)["rolls"]
            broker.stop()
        finally:
            broker.kill()

    def _publish(self, producer: Producer, wave: int) -> None:
        for n in range(wave * 10, wave * 10 + 10):
            size = (300, 9000, 40, 16000, 3000)[n % 5]
            self.history.sending("p", n)
            sent = producer.send(TOPIC, value_of("p", n, size), partition=n // 2 % PARTITIONS)
            if n % 3:  # now and then several in one group
                self._mark(f"ack {sent.partition} {sent.result(20.0)} {n}")

    def _consume(self, consumer: Consumer) -> None:
        for record in consumer.poll(5.0):
            consumer.ack(record)
        places = consumer.positions()
        consumer.commit(10.0)
        for (_, partition), position in places.items():
            self._mark(f"group {partition} {position.next_offset}")

    def _mark(self, text: str) -> None:
        shim.mark(self.trace, text.encode())

    def states(self, limit: int) -> Iterator[crashstates.State]:
        return crashstates.states(self.trace, self.root, lambda: self.scratch, seed=SEED, limit=limit)

    def problems(self, state: crashstates.State) -> list[str]:
        """Open a state as a starting node does and hold it against what the client was told before."""
        words = [mark.decode().split() for mark in state.marks]
        try:
            found = recover(state.materialise())
        except Exception as error:
            return [f"refuses to start: {error!r}"]
        if not words:
            return []
        if not found.content:
            return ["the topic is gone", *(f"acknowledged, but lost: {line}" for line in words if line[0] == "ack")]
        self.history.acks = [
            Ack(TOPIC, int(line[1]), int(line[2]), "p", int(line[3]), "durable") for line in words if line[0] == "ack"
        ]
        problems = self.history.problems(TOPIC, found.content, retention=True)
        if found.corrupt_ranges:
            problems.append(f"{found.corrupt_ranges} corrupt ranges although nothing is damaged")
        for partition, least in {int(line[1]): int(line[2]) for line in words if line[0] == "group"}.items():
            offset = found.offsets.get(partition, -1)
            if not least <= offset <= found.content[partition].durable_end:
                problems.append(f"the group is at {offset} in partition {partition}, it was stored at {least}")
        return problems


def _storage(broker: BrokerProcess) -> dict[str, int]:
    found: dict[str, int] = call(broker.admin, "GET", "/v1/node")["storage"]
    return found


def recover(directory: Path) -> Recovered:
    """What the storage engine finds in a directory."""
    config = load_config(None, {"node.data_dir": str(directory)}, SETTINGS)
    # The broker's own wiring, without listening.
    broker = Broker(config, SystemClock())
    store = broker.engine
    assert isinstance(store, SegmentStore)
    store.open(Listener())
    # Closed before the files are read: a start may go on with retention at once.
    ends = {log.partition: log.durable_end for log in store.partitions(TOPIC)}
    corrupt_ranges = sum(len(log.corrupt_ranges) for log in store.partitions(TOPIC))
    offsets = {partition: place.next_offset for (_, _, partition), place in store.group_offsets().items()}
    store.close(5.0)
    broker.loop.close()
    content = {}
    for partition, end in ends.items():
        place = directory / "topics" / TOPIC / str(partition)
        content[partition] = read_files(place, read_identity(place).log_start, end)
    return Recovered(content, offsets, corrupt_ranges)


@pytest.fixture
def crash_lab(tmp_path: Path) -> Iterator[Lab]:
    place = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else tmp_path
    memory = Path(tempfile.mkdtemp(dir=place))
    level = logging.getLogger("edgebroker").level
    logging.getLogger("edgebroker").setLevel(logging.CRITICAL + 1)
    yield Lab(tmp_path, memory)
    logging.getLogger("edgebroker").setLevel(level)
    shutil.rmtree(memory)


def test_no_state_loses_what_was_acknowledged(crash_lab: Lab) -> None:
    crash_lab.workload()
    count = 0
    for state in crash_lab.states(LIMIT):
        problems = crash_lab.problems(state)
        assert not problems, f"EB_CRASH_SEED={SEED}, state {count}: {state.describe()}: {problems[:8]}"
        count += 1
    print(f"{count} states, all good")
    assert count > 300


@pytest.mark.parametrize("rule", ["fdatasync:.log$:*:skip", "fsync:topics:*:skip"], ids=["data", "directories"])
def test_without_the_syncs_records_are_lost(crash_lab: Lab, rule: str) -> None:
    """The proof that the states are worth something: a broker that does not sync fails them."""
    crash_lab.workload(rule)
    lossy = lost = count = 0
    for state in crash_lab.states(4):
        found = sum("lost" in problem for problem in crash_lab.problems(state))
        lossy, lost, count = lossy + bool(found), max(lost, found), count + 1
        if count >= 250 and lossy:
            break
    print(f"{rule}: {lossy} of {count} states lose acknowledged records, at most {lost} of them")
    assert lossy
