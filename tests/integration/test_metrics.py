"""/metrics as a scraper sees it, the lag in seconds, and what is said when a node is not well any more."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families

from edgebroker.broker.admin import exposition
from edgebroker.broker.admin.exposition import families
from edgebroker.broker.observe.health import Health, Supervisor, Verdict
from edgebroker.broker.observe.host import device_of, read_machine
from edgebroker.broker.observe.lags import MOST, Lags
from edgebroker.broker.observe.problems import ADVICE, BLOCKING
from edgebroker.common.histogram import BOUNDS, Histogram
from edgebroker.common.runtime import scheduler
from edgebroker.network.http.router import Call
from edgebroker.network.http.server import Reply, Request, Response
from edgebroker.network.io.loop import Loop
from tests.kit.brokers import RunningBroker, numbered, running
from tests.kit.clock import ManualClock

ROOT = Path(__file__).parents[2]


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as found:
        yield found


def scraping(reply: Reply) -> Call:
    return Call(Request("GET", "/metrics", b""), {}, None, reply)


def scrape(broker: RunningBroker) -> str:
    found: list[Response] = []
    done = threading.Event()

    def reply(response: Response) -> None:
        found.append(response)
        done.set()

    broker.call(lambda: broker.broker.exposition.answer(scraping(reply)))
    assert done.wait(10.0)
    assert found[0].status == 200, found[0].body
    assert isinstance(found[0].body, str)
    return found[0].body


def values(text: str) -> dict[tuple[str, ...], float]:
    """(name, label values in alphabetical order of their names...) -> value."""
    return {
        (sample.name, *(sample.labels[name] for name in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_what_happened_is_counted(broker: RunningBroker) -> None:
    broker.create("t", partitions=2)
    client = broker.raw()
    client.publish("t", numbered(0, 10))
    client.subscribe("t", "g")
    client.deliver()
    found = values(scrape(broker))
    assert found["edgebroker_records_published_total",] == 10
    assert found["edgebroker_log_end_offset", "0", "t"] == 10
    assert found["edgebroker_log_end_offset", "1", "t"] == 0
    assert found["edgebroker_consumer_lag_records", "g", "0", "t"] == 10
    assert found["edgebroker_consumer_members", "g"] == 1
    assert found["edgebroker_sync_duration_seconds_count",] >= 1
    assert found["edgebroker_append_latency_seconds_bucket", "+Inf"] >= 1
    assert found["edgebroker_ready",] == 1
    assert found["edgebroker_problem", "disk_full"] == 0
    assert found["process_resident_memory_bytes",] > 1 << 20
    assert found["edgebroker_series_left_out",] == 0


def test_the_page_lists_exactly_what_can_be_shown(broker: RunningBroker) -> None:
    names = {family.name: family for family in families()}
    kinds = {"gauge": "gauge", "counter": "counter", "histogram": "histogram"}
    for family in text_string_to_metric_families(scrape(broker)):
        name = family.name + ("_total" if family.type == "counter" else "")
        assert kinds[names[name].kind] == family.type, name
        assert names[name].help == family.documentation
        for sample in family.samples:
            assert set(sample.labels) - {"le"} == set(names[name].labels)
    sys.path.insert(0, str(ROOT / "packaging"))
    try:
        from metrics_page import page
    finally:
        sys.path.pop(0)
    assert (ROOT / "docs" / "metrics.md").read_text() == page(), "run: make docs"


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (package prometheus)")
def test_promtool_has_nothing_to_say(broker: RunningBroker) -> None:
    broker.create("t")
    broker.raw().publish("t", numbered(0, 1))
    done = subprocess.run(["promtool", "check", "metrics"], input=scrape(broker), text=True, capture_output=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_pieces_are_one_text(broker: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """More logs than fit into a slice and a piece; some beyond the limit."""
    broker.create("many", partitions=200)
    whole = values(scrape(broker))
    monkeypatch.setattr(exposition, "SLICE", 7)
    monkeypatch.setattr(exposition, "PIECE", 3)
    cut = values(scrape(broker))
    assert {key for key in whole if "many" in key} == {key for key in cut if "many" in key}
    assert sum(key[0] == "edgebroker_log_end_offset" for key in cut) == 200
    monkeypatch.setattr(exposition, "MOST_SERIES", 50)
    few = values(scrape(broker))
    assert sum(key[0] == "edgebroker_log_end_offset" for key in few) == 50
    assert few["edgebroker_series_left_out",] == 150


def test_the_first_scrape_names_who_holds_bytes(broker: RunningBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who holds what is looked up in steps, here one in each turn of the loop."""
    monkeypatch.setattr(scheduler, "SLICE_SECONDS", 0.0)
    broker.create("t", segment_bytes=1 << 16)
    client = broker.raw()
    for first in range(0, 200, 10):
        client.publish("t", numbered(first, 10, 1000))
    client.subscribe("t", "g")
    client.deliver()
    assert values(scrape(broker))["edgebroker_held_bytes", "group", "g"] > 60_000


def test_scrapes_at_the_same_time_share_an_answer(broker: RunningBroker) -> None:
    found: list[object] = []
    done = threading.Event()

    def reply(response: Response) -> None:
        found.append(response.body)
        if len(found) == 3:
            done.set()

    broker.call(lambda: [broker.broker.exposition.answer(scraping(reply)) for _ in range(3)])
    assert done.wait(10.0)
    assert found[0] is found[1] is found[2]


def test_what_cannot_be_rendered_is_answered(
    broker: RunningBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(path: str) -> None:
        raise psutil.AccessDenied

    monkeypatch.setattr(exposition, "read_machine", fail)
    status, answer = broker.http("GET", "/metrics")
    assert status == 500
    assert answer["error"] == "the metrics cannot be rendered; the log of this node says why"
    assert "AccessDenied" in caplog.text


def test_the_machine_is_told(tmp_path: Path) -> None:
    found = read_machine(str(tmp_path))
    assert found["process_open_fds"][0][1] >= 3
    assert found["edgebroker_machine_memory_bytes"][0][1] == psutil.virtual_memory().total
    device = device_of(tmp_path)
    if device in psutil.disk_io_counters(perdisk=True):
        assert found["edgebroker_device_written_bytes_total"][0][0] == (device,)


def test_histograms_count_up_to_their_bounds() -> None:
    histogram = Histogram()
    for value in (0.0, BOUNDS[0], BOUNDS[0] * 1.01, BOUNDS[-1] * 2):
        histogram.observe(value)
    assert histogram.counts[0] == 2
    assert histogram.counts[1] == 1
    assert histogram.counts[-1] == 1
    assert sum(histogram.counts) == 4


# ---- the lag in seconds ----


class Engine:
    """One log that grows as told; nothing is known of what earlier runs stored but `age`."""

    def __init__(self) -> None:
        self.log = SimpleNamespace(durable_end=0, log_start=0, identity=SimpleNamespace(log_id="a"))
        self.age = 0

    def logs(self) -> list[SimpleNamespace]:
        return [self.log]

    def age_ms(self, log: object, next_offset: int) -> int:
        return self.age


@pytest.fixture
def loop() -> Iterator[Loop]:
    made = Loop(ManualClock())
    yield made
    made.close()


def test_lag_in_seconds_against_the_whole_history(loop: Loop) -> None:
    """A record every third second, for an hour; the oracle remembers everything."""
    engine, clock, born = Engine(), ManualClock(), []
    lags = Lags(engine, loop)  # type: ignore[arg-type]
    lags.sample(clock.monotonic())
    for second in range(3600):
        clock.advance(1.0)
        if second % 3 == 0:
            born.append(clock.monotonic())
            engine.log.durable_end += 1
        lags.sample(clock.monotonic())
    now = clock.monotonic()
    assert lags.seconds(engine.log, engine.log.durable_end, now) == 0.0  # type: ignore[arg-type]
    for offset, when in enumerate(born):
        found, true = lags.seconds(engine.log, offset, now), now - when  # type: ignore[arg-type]
        assert found <= true + 0.001, offset
        assert found >= true * 7 / 8 - 1, offset
        if true <= 8:
            assert found >= true - 1
    assert len(lags._samples["a"]) <= MOST


def test_the_lag_of_what_was_there_before_this_run(loop: Loop) -> None:
    engine = Engine()
    lags = Lags(engine, loop)  # type: ignore[arg-type]
    engine.log.durable_end, engine.age = 10, 86_400_000
    lags.sample(1000.0)
    assert lags.seconds(engine.log, 3, 1010.0) == 86_400.0  # type: ignore[arg-type]
    engine.age = 0
    assert lags.seconds(engine.log, 3, 1010.0) == 10.0  # type: ignore[arg-type]


def test_a_log_that_was_cut_begins_again(loop: Loop) -> None:
    engine = Engine()
    lags = Lags(engine, loop)  # type: ignore[arg-type]
    for end in (0, 100, 50):
        engine.log.durable_end = end
        lags.sample(float(end))
    assert lags._samples["a"] == [(50, 50.0)]


# ---- health ----


class StatusLines(Supervisor):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def status(self, line: str) -> None:
        self.lines.append(line)


def test_every_problem_has_an_advice_and_a_row_in_the_manual(broker: RunningBroker) -> None:
    manual = (ROOT / "docs" / "operations.md").read_text()
    for name in ADVICE:
        assert f"| `{name}`" in manual, name
    named = set(broker.broker.problems())
    assert named <= set(ADVICE)
    assert set(BLOCKING) <= set(ADVICE)


def test_changes_are_logged_once_with_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    problems: dict[str, str] = {}
    missing = [""]
    told = StatusLines()
    well = Health(lambda: True, lambda: dict(problems), lambda: missing[0], told)
    caplog.set_level(logging.INFO)
    well.check()
    assert well.verdict().status == "ok"
    problems["disk_full"] = "3 MiB are free"
    well.check()
    well.check()
    assert well.verdict().status == "not ready"
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert ADVICE["disk_full"] in caplog.text
    problems.clear()
    missing[0] = "no route"
    well.check()
    assert well.verdict() == Verdict(
        "degraded", {"started": "ok", "storage": "ok"}, {"parent": "not connected: no route"}
    )
    assert "resolved: disk_full" in caplog.text
    assert told.lines == ["ready", "disk_full: 3 MiB are free", "parent: not connected: no route"]
