"""A consumer's places in a file: what is not known better stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from edgebroker.client.consume.positions import PositionFile
from edgebroker.common.types import Position
from tests.kit.brokers import SECONDS, RunningBroker, config_for, numbered, running

LOG = bytes(range(16))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with a place in t/0."""
    PositionFile(tmp_path / "places").update({("t", 0): Position(LOG, 3, 7)})
    return tmp_path / "places"


@pytest.mark.parametrize("moved", [{}, {("t", 1): Position(LOG, 1, 2)}, {("u", 0): Position(LOG, 1, 2)}])
def test_places_are_stored_beside_the_others(path: Path, moved: dict[tuple[str, int], Position]) -> None:
    file = PositionFile(path)
    expected = {**file.read(), **moved}
    for _ in range(2):
        file.update(moved)
        assert PositionFile(path).read() == expected
    file.update({("t", 0): Position(LOG, 3, 8)})
    assert PositionFile(path).read() == {**expected, ("t", 0): Position(LOG, 3, 8)}


def test_closing_before_anything_was_assigned(path: Path, tmp_path: Path) -> None:
    gone = RunningBroker(config_for(tmp_path / "data"))
    gone.stop()
    before = path.read_bytes()
    with gone.consumer(["t"], position_file=path) as consumer:
        assert consumer.poll(0.0) == []
    assert path.read_bytes() == before


def test_a_commit_that_is_not_stored_in_time_moves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, held = tmp_path / "places", list[Callable[[], None]]()
    monkeypatch.setattr("edgebroker.client.consumer.POSITIONS_SECONDS", 3600.0)
    with running(tmp_path / "data", {"storage.engine": "memory"}) as broker:
        broker.raw("fill").publish("t", numbered(0, 3))
        with broker.consumer(["t"], "g", position_file=path, auto_ack=False) as consumer:
            records = consumer.poll(SECONDS)
            consumer.ack(records[0])
            consumer.commit(SECONDS)
            monkeypatch.setattr(broker.broker.engine, "when_stored", held.append)
            consumer.ack(records[1])
            with pytest.raises(TimeoutError, match="did not confirm"):
                consumer.commit(0.02)
            assert PositionFile(path).read()["t", 0].next_offset == 1
            monkeypatch.undo()
            broker.call(lambda: [stored() for stored in held])
            consumer.commit(SECONDS)
            assert PositionFile(path).read()["t", 0].next_offset == 2


def test_partitions_that_another_member_holds_keep_their_places(tmp_path: Path) -> None:
    path = tmp_path / "places"
    with running(tmp_path / "data", {"storage.engine": "memory"}) as broker:
        broker.create("t", partitions=2)
        for partition in range(2):
            broker.raw("fill").publish("t", numbered(0, 3), partition=partition)
        with broker.consumer(["t"], "g", position_file=path) as consumer:
            for _ in range(2):
                consumer.ack(consumer.poll(SECONDS)[0])
        before = PositionFile(path).read()
        assert [before["t", partition].next_offset for partition in range(2)] == [1, 1]
        other = broker.raw("other")
        other.subscribe("t", "g", partition=0)
        other.assigned(0)
        with broker.consumer(["t"], "g", position_file=path) as consumer:
            consumer.ack(consumer.poll(SECONDS)[-1])
            consumer.commit(SECONDS)
        assert PositionFile(path).read() == {**before, ("t", 1): before["t", 1]._replace(next_offset=3)}


@pytest.mark.parametrize("there", [True, False])
def test_places_in_topics_that_are_not_read(path: Path, tmp_path: Path, there: bool) -> None:
    """They are kept for whoever reads these, and ask the broker for nothing."""
    with running(tmp_path / "data", {"storage.engine": "memory"}) as broker:
        for topic in ("t", "u") if there else ("u",):
            broker.raw("fill").publish(topic, numbered(0, 3))
        with broker.consumer(["u"], position_file=path, auto_ack=False) as consumer:
            records = consumer.poll(SECONDS)
            assert [record.topic for record in records] == ["u"] * 3
            consumer.ack(records[-1])
            consumer.commit(SECONDS)
    assert {key: place.next_offset for key, place in PositionFile(path).read().items()} == {("t", 0): 7, ("u", 0): 3}
