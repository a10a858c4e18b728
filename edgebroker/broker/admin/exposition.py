"""GET /metrics: the plain counters of the node in the text format of Prometheus.

    a scrape -> the loop notes numbers, SLICE logs or groups a turn -> a thread of its own renders them -> the answer

Nothing on the data path knows of it. Rendering by prometheus_client takes about 15 us a line, and the interpreter
would let the thread have it for its whole switch interval: it renders PIECE lines, then gives way, so that the loop
never waits longer than that. Scrapes that come meanwhile get the same answer. prometheus_client is imported by the
first scrape. Labels are bounded: names of topics and groups, at most MOST_SERIES of each kind.
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

from edgebroker.broker.admin.context import AdminContext
from edgebroker.broker.admin.gauges import GAUGES
from edgebroker.broker.delivery.state import Group
from edgebroker.broker.holders import Holder
from edgebroker.broker.observe.host import MACHINE, read_machine
from edgebroker.broker.observe.metrics import counters_of
from edgebroker.broker.observe.problems import ADVICE
from edgebroker.broker.ports import Key
from edgebroker.common.histogram import BOUNDS, Histogram
from edgebroker.common.runtime.clock import sleep
from edgebroker.common.runtime.threads import Worker
from edgebroker.network.http.router import Call
from edgebroker.network.http.server import Failed, Response
from edgebroker.storage.engine import Log
from edgebroker.version import __version__

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SLICE = 50
PIECE = 25
PAUSE_SECONDS = 0.0002
MOST_SERIES = 2000
MOST_HOLDERS = 100
LOG = ("topic", "partition")
GROUP = ("group", "topic", "partition")


class Family(NamedTuple):
    """A metric without its numbers: what docs/metrics.md lists."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...] = ()


class Sample(NamedTuple):
    labels: tuple[str, ...]
    value: float


Noted = dict[str, list[Sample] | Histogram]

_FAMILIES = (
    Family("edgebroker_build_info", "gauge", "1; the labels say what runs", ("version", "python")),
    Family("edgebroker_node_info", "gauge", "1; the labels say where it stands", ("name", "level", "region")),
    Family("edgebroker_problem", "gauge", "1 while something is wrong (docs/operations.md)", ("problem",)),
    Family(
        "edgebroker_loop_lag_seconds", "histogram", "how late a timer of the event loop fires, looked at each second"
    ),
    Family("edgebroker_requests_refused_total", "counter", "answers other than OK", ("code",)),
    Family(
        "edgebroker_limit_reached_total", "counter", "times that a limit of the configuration was reached", ("limit",)
    ),
    Family("edgebroker_tenant_stored_bytes", "gauge", "bytes that the topics of a tenant take", ("tenant",)),
    Family("edgebroker_tenant_connections", "gauge", "connections of a tenant's applications", ("tenant",)),
    Family("edgebroker_tenant_received_bytes_total", "counter", "bytes that they sent", ("tenant",)),
    Family("edgebroker_tenant_sent_bytes_total", "counter", "bytes that were delivered to them", ("tenant",)),
    Family("edgebroker_append_latency_seconds", "histogram", "from the first batch of a commit group to its sync"),
    Family("edgebroker_sync_duration_seconds", "histogram", "syncs of log files"),
    Family(
        "edgebroker_push_latency_seconds",
        "histogram",
        "from the first batch of a commit group to the sockets of waiting consumers",
    ),
    Family("edgebroker_log_start_offset", "gauge", "first offset that is stored", LOG),
    Family("edgebroker_log_end_offset", "gauge", "offset behind the last durable record", LOG),
    Family("edgebroker_log_size_bytes", "gauge", "stored bytes", LOG),
    Family("edgebroker_log_damaged_records", "gauge", "records in corrupt ranges that are not repaired yet", LOG),
    Family("edgebroker_log_appended_bytes_total", "counter", "bytes appended since the start", LOG),
    Family("edgebroker_consumer_committed_offset", "gauge", "next offset of a group", GROUP),
    Family("edgebroker_consumer_lag_records", "gauge", "records that a group has not acknowledged", GROUP),
    Family(
        "edgebroker_consumer_lag_seconds",
        "gauge",
        "for how long at least the next record of a group has been there",
        GROUP,
    ),
    Family("edgebroker_consumer_in_flight_records", "gauge", "records delivered and not acknowledged", GROUP),
    Family("edgebroker_held_bytes", "gauge", "sealed segments that a group or child has not passed", ("kind", "name")),
    Family("edgebroker_holder_silent_seconds", "gauge", "since the holder was heard; 0: connected", ("kind", "name")),
    Family("edgebroker_consumer_members", "gauge", "members of a group", ("group",)),
    Family("edgebroker_series_left_out", "gauge", "logs and groups beyond the limit of series, which are not shown"),
)
# What the engine says of itself, under its names.
_STORAGE = (
    Family("commit_groups", "counter", "groups of batches written and synced together"),
    Family("commit_bytes", "counter", "bytes written in them"),
    Family("rolls", "counter", "segments begun"),
    Family("metadata_transactions", "counter", "transactions of meta.db"),
    Family("cold_reads", "counter", "reads that went to the disk"),
    Family("read_timeouts", "counter", "reads that the disk did not answer in time"),
    Family("quarantined_ranges", "gauge", "damaged ranges that are kept"),
    Family("removed_segments", "counter", "segments removed by retention"),
    Family("verified_bytes", "counter", "bytes checked in the background"),
    Family("unverified_segments", "gauge", "segments that an earlier run wrote and this one has not checked yet"),
    Family("log_bytes", "gauge", "bytes of all logs together"),
    Family("disk_free_bytes", "gauge", "free space of the data directory's file system"),
    Family("disk_bytes", "gauge", "size of that file system"),
    Family("disk_usable_bytes", "gauge", "what can be written until producers are refused"),
)


def _storage_families() -> Iterator[tuple[str, Family]]:
    for name, kind, text, _ in _STORAGE:
        end = "_total" if kind == "counter" else ""
        yield name, Family(f"edgebroker_storage_{name}{end}", kind, text)


def families() -> list[Family]:
    """Everything that /metrics can show, sorted by name."""
    counters = [Family(f"edgebroker_{one.name}_total", "counter", one.metadata["help"]) for one in counters_of()]
    storage = [family for _, family in _storage_families()]
    machine = [Family(*fields) for fields in MACHINE]
    gauges = [Family(one.name, one.kind, one.help) for one in GAUGES]
    return sorted([*_FAMILIES, *gauges, *counters, *storage, *machine])


def _failed() -> Response:
    return Response(500, Failed("the metrics cannot be rendered; the log of this node says why"))


class Exposition:
    """Owned by the loop thread; one thread of its own, from the first scrape on."""

    def __init__(self, node: AdminContext) -> None:
        self._node, self._loop = node, node.loop
        self._worker: Worker | None = None
        self._waiting: list[Call] = []

    def answer(self, call: Call) -> None:
        """Answer now or, when numbers are being gathered, with the others that wait."""
        self._waiting.append(call)
        if len(self._waiting) > 1:
            return
        noted: Noted = {}
        steps = self._note(noted)

        def turn() -> None:
            try:
                more = next(steps, None) is not None
            except Exception:
                log.exception("the metrics cannot be rendered")
                self._rendered(_failed())
                return
            if more:
                self._loop.call_later(0.0, turn)
            else:
                self._render(noted)

        turn()

    def stop(self) -> None:
        if self._worker is not None:
            self._worker.stop(5.0)

    def _render(self, noted: Noted) -> None:
        if self._worker is None:
            self._worker = Worker("metrics")
        path = self._node.node.data_dir

        def work() -> None:
            try:
                noted.update({name: [Sample(*one) for one in found] for name, found in read_machine(path).items()})
                response = Response(200, "".join(_text(noted)), content_type=CONTENT_TYPE)
            except BaseException:  # whatever it is, those who wait are answered
                # SystemExit is what a frozen program's import says when its file was removed meanwhile.
                log.exception("the metrics cannot be rendered")
                response = _failed()
            self._loop.call_soon_threadsafe(lambda: self._rendered(response))

        self._worker.submit(work)

    def _rendered(self, response: Response) -> None:
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            call.answer(response)

    # ---- on the loop: only notes numbers ----

    def _note(self, noted: Noted) -> Iterator[bool]:
        """Note everything, yielding whenever the loop should turn."""
        self._note_node(noted)
        logs = list(self._node.core.engine.logs())
        groups = self._node.core.groups
        left_out = max(0, len(logs) - MOST_SERIES) + max(0, groups.offsets - MOST_SERIES)
        every_offset = ((group, key) for group in groups.all() for key in group.committed_offsets)
        logs, committed_offsets = logs[:MOST_SERIES], list(islice(every_offset, MOST_SERIES))
        for first in range(0, len(logs), SLICE):
            yield True
            for log in logs[first : first + SLICE]:
                _note_log(noted, log)
        for first in range(0, len(committed_offsets), SLICE):
            yield True
            for group, key in committed_offsets[first : first + SLICE]:
                self._note_group(noted, group, key)
        holders: list[list[Holder]] = []
        self._node.holders.look(holders.append)
        while not holders:
            yield True
        for holder in holders[0][:MOST_HOLDERS]:
            if holder.bytes:
                labels = (holder.kind, holder.name)
                _add(noted, "edgebroker_held_bytes", Sample(labels, holder.bytes))
                _add(noted, "edgebroker_holder_silent_seconds", Sample(labels, holder.silent_seconds))
        for group in islice(self._node.core.groups.all(), MOST_SERIES):
            _add(noted, "edgebroker_consumer_members", Sample((group.name,), len(group.members)))
        _add(noted, "edgebroker_series_left_out", Sample((), left_out))

    def _note_group(self, noted: Noted, group: Group, key: Key) -> None:
        log, committed, cursor = (
            self._node.core.engine.log(*key),
            group.committed_offsets.get(key),
            group.holders.get(key),
        )
        if log is None or committed is None:
            return
        offset, labels = max(committed.next_offset, 0), (group.name, key[0], str(key[1]))
        seconds = self._node.lags.seconds(log, offset, self._loop.now())
        _add(noted, "edgebroker_consumer_committed_offset", Sample(labels, committed.next_offset))
        _add(noted, "edgebroker_consumer_lag_records", Sample(labels, max(0, log.durable_end - offset)))
        _add(noted, "edgebroker_consumer_lag_seconds", Sample(labels, seconds))
        _add(noted, "edgebroker_consumer_in_flight_records", Sample(labels, cursor.in_flight if cursor else 0))

    def _note_node(self, noted: Noted) -> None:
        context, metrics = self._node, self._node.core.metrics
        for one in counters_of():
            _add(noted, f"edgebroker_{one.name}_total", Sample((), getattr(metrics, one.name)))
        for code, count in metrics.refused_by_code.items():
            _add(noted, "edgebroker_requests_refused_total", Sample((code,), count))
        for name, count in metrics.limits_reached.items():
            _add(noted, "edgebroker_limit_reached_total", Sample((name,), count))
        for tenant in context.access.tenants:
            for name, count in (
                ("stored_bytes", tenant.stored_bytes),
                ("connections", tenant.connections),
                ("received_bytes_total", tenant.received.total),
                ("sent_bytes_total", tenant.sent.total),
            ):
                _add(noted, f"edgebroker_tenant_{name}", Sample((tenant.name,), count))
        node, problems = context.node, context.health.problems()
        for name, labels in (
            ("edgebroker_build_info", (__version__, platform.python_version())),
            ("edgebroker_node_info", (node.name, context.mirroring.level, node.region)),
        ):
            _add(noted, name, Sample(labels, 1))
        for problem in ADVICE:
            _add(noted, "edgebroker_problem", Sample((problem,), problem in problems))
        for gauge in GAUGES:
            value = gauge.read(context)
            if value is not None:
                _add(noted, gauge.name, Sample((), value))
        latencies = context.core.engine.latencies()
        for name, histogram in (
            ("edgebroker_push_latency_seconds", metrics.push_latency),
            ("edgebroker_loop_lag_seconds", metrics.loop_lag),
            ("edgebroker_append_latency_seconds", latencies.get("append")),
            ("edgebroker_sync_duration_seconds", latencies.get("sync")),
        ):
            if histogram is not None:
                copy = noted[name] = Histogram()
                copy.counts, copy.total = list(histogram.counts), histogram.total
        storage = context.core.engine.status()
        for name, family in _storage_families():
            number = getattr(storage, name)
            if number is not None:
                _add(noted, family.name, Sample((), number))


def _note_log(noted: Noted, log: Log) -> None:
    labels = (log.topic, str(log.partition))
    damaged = sum(corrupt.next - corrupt.first for corrupt in log.corrupt_ranges)
    _add(noted, "edgebroker_log_start_offset", Sample(labels, log.log_start))
    _add(noted, "edgebroker_log_end_offset", Sample(labels, log.durable_end))
    _add(noted, "edgebroker_log_size_bytes", Sample(labels, log.size_bytes))
    _add(noted, "edgebroker_log_damaged_records", Sample(labels, damaged))
    _add(noted, "edgebroker_log_appended_bytes_total", Sample(labels, log.bytes_in))


def _add(noted: Noted, name: str, sample: Sample) -> None:
    found = noted.setdefault(name, [])
    assert isinstance(found, list)
    found.append(sample)


# ---- in the thread ----


class _One:
    """What prometheus_client renders: something with collect()."""

    def __init__(self, metric: Metric) -> None:
        self._metric = metric

    def collect(self) -> Iterator[Metric]:
        yield self._metric


def _text(noted: Noted) -> Iterator[str]:
    """The answer, piece by piece, giving way after each."""
    from prometheus_client import generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    for family in families():
        found = noted.get(family.name)
        if isinstance(found, Histogram):
            histogram = HistogramMetricFamily(family.name, family.help)
            bounds, running = [*map(str, BOUNDS), "+Inf"], 0
            buckets = [(bound, running := running + count) for bound, count in zip(bounds, found.counts, strict=True)]
            histogram.add_metric([], buckets, found.total)
            yield generate_latest(_One(histogram)).decode()
            sleep(PAUSE_SECONDS)
            continue
        for first in range(0, len(found or []), PIECE):
            make = CounterMetricFamily if family.kind == "counter" else GaugeMetricFamily
            metric = make(family.name, family.help, labels=family.labels)
            for sample in (found or [])[first : first + PIECE]:
                metric.add_metric(sample.labels, sample.value)
            text = generate_latest(_One(metric)).decode()
            yield text if not first else text.split("\n", 2)[2]  # HELP and TYPE were said
            sleep(PAUSE_SECONDS)
