"""A topic that is loaded again: what is durable when the broker is told that readers see it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from edgebroker.client.refresh import Refresh
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.consumer.database import AppDatabase
from edgebroker.consumer.declare.application import Topic
from edgebroker.consumer.generation import Generations
from edgebroker.consumer.handling.calls import Calls
from edgebroker.consumer.handling.effect import Effect, Portion
from edgebroker.consumer.handling.watch import Watch


class NotedDatabase(AppDatabase):
    """Notes commits and syncs."""

    def __init__(self, directory: Path) -> None:
        self.noted: list[str] = []
        super().__init__(directory, 1)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        with super().transaction():
            yield
        self.noted.append("commit")

    def sync(self) -> None:
        super().sync()
        self.noted.append("sync")


@pytest.mark.parametrize("owned", [True, False])
def test_a_switch_is_durable_before_the_broker_is_told(tmp_path: Path, owned: bool) -> None:
    """READY follows switch(): an instance that shares its partitions keeps no positions, and would be given nothing of
    what a power cut takes."""
    database = NotedDatabase(tmp_path)

    def apply(portion: Portion, also: Callable[[int], None]) -> None:
        with database.transaction():
            also(-1)

    clock = SystemClock()
    calls = Calls(database, Watch(clock.monotonic), clock, "till-7", logging.getLogger("app"))
    effects = {"t": Effect(Topic("t", "shared", "earliest", None, []), database, calls, lambda: 1)}
    generations = Generations(
        database, effects, apply, lambda *_: None, lambda *_: True, lambda topic: owned, lambda *_: None, force=False
    )
    refresh = Refresh(reset_id="r", log_id=bytes(16), topic="t", partition=0, from_offset=0, target=1)
    generations.begin(refresh)
    refresh.next_offset, refresh.epoch = 1, 0
    generations.load(refresh, [])
    assert database.noted[-1] == "commit"
    assert generations.switch(refresh)
    assert database.noted[-2:] == ["commit", "sync"]
    # Where the group has them, an operator may move them back: none is kept here that would pass over what comes then.
    assert set(database.positions()) == ({("t", 0)} if owned else set())
    database.close()
