"""A topic that is loaded again: what readers see whatever step was the last one, and what is durable when."""

from __future__ import annotations

import logging
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, cast

import msgspec
import pytest

from edgebroker.client.refresh import Refresh
from edgebroker.common.errors import ConfigError
from edgebroker.common.records import Record
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.types import Position, TopicPartition
from edgebroker.consumer import views as views_module
from edgebroker.consumer.database import AppDatabase
from edgebroker.consumer.declare.application import Handler, Topic
from edgebroker.consumer.declare.columns import Columns
from edgebroker.consumer.declare.declarations import RetryPolicy
from edgebroker.consumer.declare.signatures import read_signature
from edgebroker.consumer.generation import Generations
from edgebroker.consumer.handling.calls import Calls
from edgebroker.consumer.handling.effect import Effect, Portion
from edgebroker.consumer.handling.in_hand import InHand
from edgebroker.consumer.handling.watch import Watch
from edgebroker.consumer.loaded_records import LoadedRecords
from edgebroker.consumer.reloads import Reloads
from edgebroker.consumer.staging_file import StagingFile
from edgebroker.consumer.subscriptions import Subscriptions
from edgebroker.consumer.views import Views
from tests.kit import applications
from tests.kit.waiting import wait_for

LOG = bytes(16)


class Price(msgspec.Struct):
    cents: int


class NotedDatabase(AppDatabase):
    """Notes commits and syncs; ends the process, so to speak, after so many commits."""

    def __init__(self, directory: Path) -> None:
        self.noted: list[str] = []
        self.commits_left = -1
        super().__init__(directory, 1)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        if self.commits_left == 0:
            raise CrashError
        with super().transaction():
            yield
        self.commits_left -= 1
        self.noted.append("commit")

    def sync(self) -> None:
        super().sync()
        self.noted.append("sync")


class CrashError(Exception):
    pass


class WillingReloads(Reloads):
    """Says yes to everything."""

    may = True

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.again: list[int] = []

    def announce_again(self, key: TopicPartition) -> None:
        self.again.append(key.partition)

    def is_whole(self, topic: str, loading: set[int]) -> bool:
        return True

    def is_caught_up(self, topic: str, loading: object) -> bool:
        return True

    def may_switch(self, topics: Sequence[str]) -> bool:
        return self.may


class World:
    """Generations over a database, and the host of it."""

    def __init__(self, directory: Path, topics: Mapping[str, Topic], *, force: bool = False) -> None:
        self.database = NotedDatabase(directory)
        clock = SystemClock()
        views = Views(self.database, clock)
        calls = Calls(self.database, Watch(clock.monotonic), clock, "till-7", logging.getLogger("app"))
        self.effects = {name: Effect(topic, self.database, views, calls, lambda: 1) for name, topic in topics.items()}
        self.reloads = WillingReloads(
            topics, Subscriptions("app", "till-7", "", "", clock, lambda gone: None, None), "now", clock
        )
        loaded = LoadedRecords(self.database, self.effects, InHand(directory), clock, lambda: False)
        self.generations = Generations(
            self.database, views, topics, self.effects, self, loaded, self.reloads, clock, force=force
        )
        self.calls: list[tuple[int, bool]] = []

    def begun(self, key: TopicPartition, first: bool) -> None:
        self.calls.append((key.partition, first))

    def resume(self, refresh: Refresh, offset: int) -> int:
        return offset

    def switched(self, topic: str, positions: Mapping[tuple[str, int], Position]) -> None: ...

    def put(self, topic: str, records: Sequence[Record]) -> None:
        """As records come while nothing is loaded."""
        with self.database.transaction():
            self.effects[topic].apply(Portion(TopicPartition(topic, records[0].partition), records))

    def load(self, refresh: Refresh, log: Sequence[Record], size: int = 40) -> None:
        """Load from where it stands to the end of the log, then switch."""
        self.go(refresh, log, size)
        wait_for(lambda: self.step(refresh), "it is switched", 20.0)

    def go(self, refresh: Refresh, log: Sequence[Record], size: int = 40) -> None:
        refresh.next_offset = self.generations.begin(refresh)
        while refresh.next_offset < len(log):
            piece = log[refresh.next_offset : refresh.next_offset + size]
            refresh.next_offset, refresh.epoch = piece[-1].offset + 1, 0
            self.generations.load(refresh, piece)

    def step(self, *refreshes: Refresh) -> bool:
        """Is all switched?"""
        while self.generations.step():
            pass
        return all([self.generations.switch(refresh) for refresh in refreshes])

    def rows(self, view: str) -> dict[str, int]:
        return dict(applications.read(self.database.path, f"SELECT key, cents FROM {view}"))  # type: ignore[arg-type]

    def close(self) -> None:
        self.generations.close()
        self.database.close()


def record(topic: str, offset: int, key: str, cents: int | None, partition: int = 0) -> Record:
    value = None if cents is None else msgspec.json.encode({"cents": cents})
    fields = {"topic": topic, "partition": partition, "offset": offset, "timestamp": 1000 + offset, "headers": ()}
    return cast("Record", SimpleNamespace(**fields, key=key.encode(), value=value))


def refresh_of(topic: str, target: int, reset_id: str = "r", partition: int = 0) -> Refresh:
    return Refresh(
        reset_id=reset_id, log_id=LOG, topic=topic, partition=partition, from_offset=0, target=target
    )  # fmt: skip


def topic_of(name: str, **more: Any) -> Topic:
    return Topic(name, "each", "earliest", Columns(Price), [], **more)


def log_of(topic: str, rng: random.Random, count: int, keys: int = 60) -> list[Record]:
    return [
        record(topic, offset, f"k{rng.randrange(keys):03d}", None if rng.random() < 0.2 else offset)
        for offset in range(count)
    ]


def latest(log: Sequence[Record]) -> dict[str, int]:
    """The slow obvious oracle."""
    rows: dict[str, int] = {}
    for one in log:
        assert one.key is not None
        rows.pop(one.key.decode(), None)
        if one.value is not None:
            rows[one.key.decode()] = msgspec.json.decode(one.value)["cents"]
    return rows


@pytest.mark.parametrize("owned", [True, False])
def test_a_switch_is_durable_before_the_broker_is_told(tmp_path: Path, owned: bool) -> None:
    """READY follows switch(): an instance that shares its partitions keeps no positions, and would be given nothing of
    what a power cut takes."""

    def handle(value: bytes) -> None: ...

    handler = Handler("*", (), 1, 30.0, read_signature(handle, {}), RetryPolicy(), handle, "here")
    world = World(tmp_path, {"t": Topic("t", "each" if owned else "shared", "earliest", None, [handler])})
    refresh = refresh_of("t", 1)
    world.generations.begin(refresh)
    refresh.next_offset, refresh.epoch = 1, 0
    world.generations.load(refresh, [record("t", 0, "a", 1)])
    assert world.database.noted[-2:] == ["commit", "sync"], "it is acknowledged next"
    assert world.generations.switch(refresh)
    assert world.database.noted[-2:] == ["commit", "sync"]
    # Where the group has them, an operator may move them back: none is kept here that would pass over what comes then.
    assert set(world.database.positions()) == ({("t", 0)} if owned else set())
    world.close()


def test_what_was_loaded_is_the_latest_of_each_key(tmp_path: Path) -> None:
    rng = random.Random(5)
    for number in range(5):
        log = log_of("t", rng, 300)
        world = World(tmp_path / str(number), {"t": topic_of("t")}, force=True)
        world.put("t", [record("t", 0, "old", 1)])
        refresh = refresh_of("t", 200)
        world.go(refresh, log[:200])
        assert world.rows("t") == {"old": 1}
        # More comes while it is sorted and copied, and behind that.
        world.generations.switch(refresh)
        world.go(refresh, log[:260])
        wait_for(lambda: not world.generations.step() and world.generations.copied() == ["t"], "it is copied")  # noqa: B023
        world.go(refresh, log)
        assert world.rows("t") == {"old": 1}
        wait_for(lambda: world.step(refresh), "it is switched")  # noqa: B023
        assert world.rows("t") == latest(log)
        keys = [key for (key,) in applications.read(world.database.path, "SELECT key FROM t")]
        assert keys == sorted(keys)
        assert world.database.positions() == {("t", 0): Position(LOG, 0, 300)}
        while world.generations.step():
            pass
        tables = applications.read(world.database.path, "SELECT name FROM sqlite_schema WHERE name LIKE '_t_g%'")
        assert tables == [("_t_g2",)], "what is left of the one before is removed"
        assert not list(world.database.path.parent.glob("staging-*"))
        world.close()


def test_a_crash_at_each_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever was committed last: readers see all of the old rows or all of the new ones, and it goes on."""
    for name in ("FIRST_ROWS", "LEAST_ROWS", "MOST_ROWS"):
        monkeypatch.setattr(views_module, name, 5)
    log, topics = log_of("t", random.Random(6), 200), {"t": topic_of("t")}
    start = tmp_path / "start"
    world = World(start, topics, force=True)
    world.put("t", [record("t", 0, f"old{number}", number) for number in range(30)])
    old = world.rows("t")
    world.close()
    steps, crashed = 0, True
    while crashed:
        directory = tmp_path / str(steps)
        shutil.copytree(start, directory)
        refresh = refresh_of("t", 150)
        world, crashed = World(directory, topics, force=True), False
        world.database.commits_left = steps
        try:
            world.go(refresh, log[:150])
            wait_for(lambda: world.step(refresh), "it is switched")  # noqa: B023
            while world.generations.step():
                pass
        except CrashError:
            crashed = True
        seen = world.rows("t")
        assert seen in (old, latest(log[:150]))
        if (directory / "app" / "staging-t.db").exists():
            assert seen == old
        world.close()
        again, refresh = World(directory, topics, force=True), refresh_of("t", 150)
        assert again.rows("t") == seen
        again.load(refresh, log)
        while again.generations.step():
            pass
        expected = latest(log) if seen == old else latest(log[:150])
        assert again.rows("t") == expected, steps
        tables = applications.read(again.database.path, "SELECT name FROM sqlite_schema WHERE name LIKE '_t_g%'")
        assert len(tables) == 1
        again.close()
        steps += 1
    assert steps > 10


def test_a_refresh_that_is_begun_again(tmp_path: Path) -> None:
    """What an earlier attempt has sorted and copied does not count."""
    topics = {"t": topic_of("t")}
    world = World(tmp_path, topics, force=True)
    first = refresh_of("t", 100, "r1")
    world.go(first, log_of("t", random.Random(7), 100))
    world.generations.switch(first)
    wait_for(lambda: not world.generations.step() and world.generations.copied() == ["t"], "it is copied")
    log = log_of("t", random.Random(8), 50)
    world.load(refresh_of("t", 50, "r2"), log)
    assert world.rows("t") == latest(log)
    world.close()


def test_topics_that_change_together(tmp_path: Path) -> None:
    topics = {"a": topic_of("a", together=("b",)), "b": topic_of("b"), "c": topic_of("c")}
    world = World(tmp_path, topics, force=True)
    assert world.reloads.together("b") == ["b", "a"] and world.reloads.together("c") == ["c"]
    rng = random.Random(9)
    logs = {name: log_of(name, rng, 80) for name in ("a", "b")}
    refreshes = {name: refresh_of(name, 80, name) for name in logs}
    world.go(refreshes["a"], logs["a"])
    for _ in range(20):
        assert not world.step(refreshes["a"])
    world.go(refreshes["b"], logs["b"])
    before = world.database.noted.count("sync")
    world.reloads.may = False
    wait_for(lambda: not world.step(*refreshes.values()) and set(world.generations.copied()) == {"a", "b"}, "copied")
    assert (world.rows("a"), world.rows("b")) == ({}, {})
    world.reloads.may = True
    wait_for(lambda: world.step(*refreshes.values()), "both are switched")
    assert (world.rows("a"), world.rows("b")) == (latest(logs["a"]), latest(logs["b"]))
    assert world.database.noted.count("sync") == before + 1, "in one step"
    world.close()


def test_values_that_have_no_row_are_given_up(tmp_path: Path) -> None:
    world = World(tmp_path, {"t": topic_of("t")})
    bad = cast("Record", SimpleNamespace(**{**vars(record("t", 1, "bad", 1)), "value": b"{"}))
    log = [record("t", 0, "a", 1), bad, record("t", 2, "large", 1 << 70), record("t", 3, "c", 3)]
    world.load(refresh_of("t", 4), log)
    assert world.rows("t") == {"a": 1, "c": 3}
    found = applications.read(world.database.path, 'SELECT "offset" FROM _dead ORDER BY "offset"')
    assert found == [(1,), (2,)]
    world.close()


def test_a_staging_file_that_is_damaged_or_of_other_columns(tmp_path: Path) -> None:
    topics = {"t": topic_of("t")}
    log = log_of("t", random.Random(10), 60)
    world = World(tmp_path, topics)
    world.go(refresh_of("t", 60), log[:30])
    world.close()
    (tmp_path / "staging-t.db").write_bytes(b"nonsense" * 2000)
    world = World(tmp_path, topics)
    world.go(refresh_of("t", 60), log[:30])
    world.close()
    other = Columns(msgspec.defstruct("Other", [("cents", int), ("currency", str, "EUR")]))
    world = World(tmp_path, {"t": Topic("t", "each", "earliest", other, [])})
    view = world.effects["t"].view
    assert view is not None and view.stale
    world.load(refresh_of("t", 60), log)
    assert world.rows("t") == latest(log)
    assert applications.read(world.database.path, "SELECT DISTINCT currency FROM t") == [("EUR",)]
    world.close()


def handled(name: str, seen: list[bytes]) -> Topic:
    handler = Handler("*", (), 1, 30.0, read_signature(_annotated, {}), RetryPolicy(), seen.append, "here")
    return Topic(name, "each", "earliest", Columns(Price), [handler])


def _annotated(value: bytes) -> None: ...


def test_a_beginning_that_is_cut_off_is_made_again(tmp_path: Path) -> None:
    """Hooks clear what handlers have made in the transaction that begins it: without that nothing was begun."""
    seen: list[bytes] = []
    log, topics = log_of("t", random.Random(11), 40), {"t": handled("t", seen)}
    world = World(tmp_path, topics, force=True)
    world.database.commits_left = 0
    with pytest.raises(CrashError):
        world.go(refresh_of("t", 40), log)
    assert world.generations.loading() == set()
    world.close()
    again = World(tmp_path, topics, force=True)
    again.load(refresh_of("t", 40), log)
    assert again.calls == [(0, True)] and again.rows("t") == latest(log)
    assert len(seen) == sum(one.value is not None for one in log)
    again.close()


def test_rows_of_an_attempt_before_are_no_part_of_the_next(tmp_path: Path) -> None:
    """The process dies when the second attempt is sorted and nothing of it is copied."""
    topics = {"t": topic_of("t")}
    world = World(tmp_path, topics, force=True)
    world.reloads.may = False
    first = refresh_of("t", 100, "r1")
    world.go(first, log_of("t", random.Random(12), 100))
    wait_for(lambda: not world.step(first) and world.generations.copied() == ["t"], "it is copied")
    log = log_of("t", random.Random(13), 50, keys=500)
    second = refresh_of("t", 50, "r2")
    world.go(second, log)
    world.generations.switch(second)
    wait_for(lambda: bool(list(tmp_path.glob("staging-t.sorted.*"))), "it is sorted")
    world.database.commits_left = 0

    def accepted() -> bool:
        try:
            world.generations.step()
        except CrashError:
            return True
        return False

    wait_for(accepted, "it dies at the first slice")
    world.close()
    again = World(tmp_path, topics, force=True)
    again.load(refresh_of("t", 50, "r2"), log)
    assert again.rows("t") == latest(log)
    again.close()


def test_handlers_begin_with_a_whole_topic_when_one_partition_is_begun_again(tmp_path: Path) -> None:
    seen: list[bytes] = []
    world = World(tmp_path, {"t": handled("t", seen)}, force=True)
    logs = [[record("t", 0, f"k{partition}", partition, partition)] for partition in range(3)]
    for partition in (0, 1):
        world.go(refresh_of("t", 1, f"r{partition}", partition), logs[partition])
    world.go(refresh_of("t", 1, "again", 0), logs[0])
    assert world.calls == [(0, True), (1, False), (0, True)] and world.reloads.again == [1]
    assert world.generations.loading() == {("t", 0)}
    late = refresh_of("t", 1, "r1", 1)
    late.next_offset = 1
    world.generations.load(late, logs[1])  # it was received before
    assert len(seen) == 3
    world.go(refresh_of("t", 1, "r1", 1), logs[1])
    assert world.calls[3:] == [(1, False)] and len(seen) == 4, "it comes from its beginning"
    world.close()


def test_columns_of_any_name(tmp_path: Path) -> None:
    names = ("rowid", "number", "_number", "_gone", "gone", "k", "c0", "c1", "p", "o", "t", "latest", "oid", "order")
    kind = msgspec.defstruct("Odd", [(name, int) for name in names])
    world = World(tmp_path, {"t": Topic("t", "each", "earliest", Columns(kind), [])}, force=True)
    log = []
    for number in range(200):
        value = msgspec.json.encode({name: number * 7 - 1000 + place for place, name in enumerate(names)})
        log.append(
            cast("Record", SimpleNamespace(**{**vars(record("t", number, f"k{number:03d}", 1)), "value": value}))
        )
    world.put("t", log[:150])
    world.load(refresh_of("t", 200), log)
    rows = applications.read(world.database.path, 'SELECT "rowid", "number", "order" FROM t ORDER BY key')
    assert rows == [(n * 7 - 1000, n * 7 - 999, n * 7 - 1000 + len(names) - 1) for n in range(200)]
    world.close()


def test_values_that_break_their_type_are_given_up(tmp_path: Path) -> None:
    class Odd(msgspec.Struct):
        cents: int
        code: str | msgspec.UnsetType = msgspec.UNSET
        kind: Literal[1, 2] = 1

        def __post_init__(self) -> None:
            10 // self.cents

    world = World(tmp_path, {"t": Topic("t", "each", "earliest", Columns(Odd), [])})
    values = [b'{"cents":0}', b'{"cents":2,"code":"x","kind":2}', b'{"cents":3}']
    log = [
        cast("Record", SimpleNamespace(**{**vars(record("t", offset, f"k{offset}", 1)), "value": value}))
        for offset, value in enumerate(values)
    ]
    world.put("t", log)
    assert applications.read(world.database.path, "SELECT * FROM t ORDER BY key") == [
        ("k1", 2, "x", 2, 0, 1, 1001), ("k2", 3, None, 1, 0, 2, 1002)
    ]  # fmt: skip
    found = applications.read(world.database.path, "SELECT reason FROM _dead")
    assert found == [("the value is not as expected: ZeroDivisionError: integer division or modulo by zero",)]
    world.close()


@pytest.mark.parametrize("name", ["_position", "sqlite_x", "sqlite.stat1", "_a_g1"])
def test_topics_whose_views_would_have_names_that_are_taken(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="cannot have a view: names that begin with _ or sqlite_ are taken"):
        World(tmp_path, {name: topic_of(name)})


def test_names_that_only_people_tell_apart(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="topics Items and items would have views of the same name, items"):
        World(tmp_path, {"Items": topic_of("Items"), "items": topic_of("items")})


def test_a_table_of_a_handler_with_the_name_of_a_view(tmp_path: Path) -> None:
    database = AppDatabase(tmp_path, 1)
    with database.transaction():
        database.lend()
        database.execute("CREATE TABLE T_Post (a)")
    database.close()
    with pytest.raises(ConfigError, match="would be called t_post, which is a table that a handler has made"):
        World(tmp_path, {"t.post": topic_of("t.post")})


def test_a_crash_while_it_is_found_out_which_value_cannot_be_stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One record at a time, and all of them with the position behind them, or none."""
    topics = {"t": topic_of("t")}
    log = [record("t", n, f"k{n}", 1 << 70 if n == 2 else n) for n in range(5)]
    world, really, puts = World(tmp_path, topics), StagingFile.put, [0]

    def sometimes(self: StagingFile, *arguments: Any) -> None:
        puts[0] += 1
        if puts[0] == 4:
            raise CrashError
        really(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(CrashError):
        patch.setattr(StagingFile, "put", sometimes)
        world.go(refresh_of("t", 5), log)
    world.close()
    again = World(tmp_path, topics)
    again.load(refresh_of("t", 5), log)
    assert again.rows("t") == {"k0": 0, "k1": 1, "k3": 3, "k4": 4}
    again.close()


def test_what_a_power_cut_brings_back_does_not_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The database says that an attempt was begun, durably, before the files of the one before go; and a sorted file of
    that one, whose removal was not durable, is none of this one."""
    topics = {"t": topic_of("t")}
    world = World(tmp_path, topics, force=True)
    first = refresh_of("t", 100, "r1")
    world.go(first, log_of("t", random.Random(14), 100))
    world.generations.switch(first)
    wait_for(lambda: not world.generations.step() and world.generations.copied() == ["t"], "it is copied")
    kept, really = (tmp_path / "staging-t.sorted").read_bytes(), StagingFile.begin

    def noted(self: StagingFile, *arguments: Any) -> None:
        world.database.noted.append("file")
        really(self, *arguments)

    monkeypatch.setattr(StagingFile, "begin", noted)
    log = log_of("t", random.Random(15), 50, keys=500)
    world.go(refresh_of("t", 50, "r2"), log)
    assert world.database.noted[-4:] == ["commit", "commit", "sync", "file"]
    world.close()
    for back in (kept, kept[:5000], b"nonsense"):
        (tmp_path / "staging-t.sorted").write_bytes(back)
        again = World(tmp_path, topics, force=True)
        assert not (tmp_path / "staging-t.sorted").exists()
        again.close()
    again = World(tmp_path, topics, force=True)
    again.load(refresh_of("t", 50, "r2"), log)
    assert again.rows("t") == latest(log)
    again.close()


def test_what_comes_once_more_has_no_second_effect(tmp_path: Path) -> None:
    """As after a start, when the copy has less than was loaded; however small the pieces are in which it comes."""
    seen: list[bytes] = []
    world = World(tmp_path, {"t": handled("t", seen)}, force=True)
    log, refresh = [record("t", number, f"k{number % 7}", number) for number in range(50)], refresh_of("t", 50)
    world.go(refresh, log[:40])
    for begin, size in ((0, 3), (20, 50)):
        for first in range(begin, 40, size):
            piece = log[first : min(40, first + size)]
            refresh.next_offset = piece[-1].offset + 1
            world.generations.load(refresh, piece)
    assert len(seen) == 40
    known = world.effects["t"].loading[0].position.next_offset
    assert known == 40 and world.generations.loading() == {("t", 0)}
    refresh.next_offset = 50
    world.generations.load(refresh, log[40:])
    wait_for(lambda: world.step(refresh), "it is switched", 20.0)
    assert world.rows("t") == latest(log) and len(seen) == 50
    world.close()


def test_what_is_left_of_a_switch_is_removed(tmp_path: Path) -> None:
    """The process ended between the transaction and the removal of the files."""
    topics = {"t": topic_of("t")}
    world, log = World(tmp_path, topics), log_of("t", random.Random(5), 60)
    world.go(refresh_of("t", 60), log)
    kept = tmp_path / "kept"
    kept.mkdir()
    world.reloads.may = False
    wait_for(lambda: not world.step(refresh_of("t", 60)) and world.generations.copied(), "it is copied")
    for path in tmp_path.glob("staging-*"):
        shutil.copy(path, kept / path.name)
    world.reloads.may = True
    assert world.step(refresh_of("t", 60))
    world.close()
    for path in kept.iterdir():
        shutil.move(path, tmp_path / path.name)
    again = World(tmp_path, topics)
    while again.generations.step():
        pass
    assert not list(tmp_path.glob("staging-*")) and again.rows("t") == latest(log)
    tables = "SELECT count(*) FROM sqlite_schema WHERE type='table' AND name GLOB '_t_g*'"
    assert applications.read(again.database.path, tables) == [(1,)]
    assert applications.read(again.database.path, "SELECT loading FROM _state") == [(0,)]
    again.close()
