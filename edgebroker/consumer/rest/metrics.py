"""GET /metrics of an application, in the text format of Prometheus; prometheus_client is imported by the first one.

To add a number: add a row, and run `make docs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, NamedTuple

from edgebroker.consumer.rest.answers import Stats, TopicProgress
from edgebroker.network.http.server import Response

if TYPE_CHECKING:
    from prometheus_client.core import Metric

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Number(NamedTuple):
    """`read` gives the number, or None while there is none to show."""

    name: str
    kind: str
    help: str
    read: Callable[[Stats], float | None]


class TopicNumber(NamedTuple):
    """One number for each topic."""

    name: str
    kind: str
    help: str
    read: Callable[[TopicProgress], float | None]


def _lag(topic: TopicProgress) -> float | None:
    known = [(one.end, one.next_offset) for one in topic.partitions if one.end is not None]
    return sum(max(0, end - next_offset) for end, next_offset in known) if known else None


NUMBERS = (
    Number("edgebroker_app_ready", "gauge", "1 once everything is there that was published when it began",
           lambda stats: stats.ready),
    Number("edgebroker_app_broker_up", "gauge", "1 while it is connected to a broker",
           lambda stats: stats.silent_seconds is not None),
    Number("edgebroker_app_records_total", "counter", "records whose effect is stored", lambda stats: stats.records),
    Number("edgebroker_app_failures_total", "counter", "attempts of handlers that failed",
           lambda stats: stats.failures),
    Number("edgebroker_app_late_calls_total", "counter", "calls that were told to end at their time limit",
           lambda stats: stats.late_calls),
    Number("edgebroker_app_waiting_partitions", "gauge", "partitions whose first record waits for another attempt",
           lambda stats: stats.waiting_partitions),
    Number("edgebroker_app_dead_records", "gauge", "records that were given up and are kept",
           lambda stats: stats.dead_records),
    Number("edgebroker_app_outbox_records", "gauge", "records that wait to be published",
           lambda stats: stats.outbox_records),
    Number("edgebroker_app_wal_bytes", "gauge", "size of app.db-wal; it grows while a reader keeps a transaction open",
           lambda stats: stats.wal_bytes),
    Number("edgebroker_app_copy_up", "gauge", "1 while the copy of topics is kept, 0 after it could not be written",
           lambda stats: None if stats.copy is None else not stats.copy.problem),
    Number("edgebroker_app_copy_bytes", "gauge", "size of the copy of topics",
           lambda stats: None if stats.copy is None else stats.copy.bytes),
    Number("edgebroker_app_copy_backlog_bytes", "gauge", "received, and not stored in the copy yet",
           lambda stats: None if stats.copy is None else stats.copy.backlog_bytes),
)  # fmt: skip
TOPIC_NUMBERS = (
    TopicNumber("edgebroker_app_lag_records", "gauge", "records that the broker has and the application lacks", _lag),
    TopicNumber("edgebroker_app_age_seconds", "gauge", "since the broker last said that there was nothing more",
                 lambda topic: None if topic.age_ms is None else topic.age_ms / 1000),
    TopicNumber("edgebroker_app_loading_partitions", "gauge", "partitions that are loaded again",
                 lambda topic: sum(one.loading for one in topic.partitions)),
)  # fmt: skip


class _Collected:
    def __init__(self, stats: Stats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        for gauge in NUMBERS:
            make = CounterMetricFamily if gauge.kind == "counter" else GaugeMetricFamily
            metric = make(gauge.name, gauge.help)
            value = gauge.read(self._stats)
            if value is not None:
                metric.add_metric([], value)
            yield metric
        for one in TOPIC_NUMBERS:
            metric = GaugeMetricFamily(one.name, one.help, labels=("topic",))
            for topic in self._stats.topics:
                value = one.read(topic)
                if value is not None:
                    metric.add_metric([topic.name], value)
            yield metric


def exposition(stats: Stats) -> Response:
    """The numbers of one moment. Takes a millisecond or two, the first time some fifty."""
    from prometheus_client import generate_latest

    return Response(200, generate_latest(_Collected(stats)), content_type=CONTENT_TYPE)
