"""The numbers of the node that are read when they are asked for: name, help and reader in one row.

To add one: add a row, and run `make docs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from edgebroker.broker.admin.context import AdminContext


class Gauge(NamedTuple):
    """`read` gives the number, or None while there is none to show."""

    name: str
    kind: str
    help: str
    read: Callable[[AdminContext], float | None]


def _parent_up(node: AdminContext) -> float | None:
    upstream = node.mirroring.upstream
    return upstream.connected if upstream is not None else None


def _pipe_lag(node: AdminContext) -> float | None:
    upstream = node.mirroring.upstream
    return upstream.lag if upstream is not None else None


def _last_heard(node: AdminContext) -> float | None:
    upstream = node.mirroring.upstream
    if upstream is None:
        return None
    heard = upstream.last_heard
    return node.clock.wall_ms() / 1000 - (node.loop.now() - heard) if heard else 0.0


def _disk_days(node: AdminContext) -> float | None:
    days = node.tree.report().disk_days
    return days if days >= 0 else None


GAUGES = (
    Gauge("edgebroker_ready", "gauge", "1 while records can be published and consumed",
          lambda node: node.health.verdict().status != "not ready"),
    Gauge("edgebroker_uptime_seconds", "gauge", "since the node was started",
          lambda node: node.clock.monotonic() - node.started_at),
    Gauge("edgebroker_connections", "gauge", "clients that are connected", lambda node: len(node.sessions)),
    Gauge("edgebroker_publish_waiting_bytes", "gauge", "bytes of producers that wait for the disk",
          lambda node: node.core.publishing.waiting_bytes),
    Gauge("edgebroker_receive_bytes", "gauge", "bytes of frames and requests that are not complete, or wait",
          lambda node: node.sessions.receiving.bytes),
    Gauge("edgebroker_receive_closed_total", "counter", "connections that were closed at limits.receive_bytes",
          lambda node: node.sessions.receiving.closed),
    Gauge("edgebroker_loop_iterations_total", "counter", "iterations of the event loop",
          lambda node: node.loop.iterations),
    Gauge("edgebroker_loop_slow_callbacks_total", "counter", "callbacks that kept the event loop for over 20 ms",
          lambda node: node.loop.slow_callbacks),
    Gauge("edgebroker_loop_failed_callbacks_total", "counter", "callbacks that ended with a defect; see the log",
          lambda node: node.loop.failed_callbacks),
    Gauge("edgebroker_pipe_parent_up", "gauge", "1 while the parent is connected; missing at a node without one",
          _parent_up),
    Gauge("edgebroker_pipe_lag_records", "gauge", "records that the parent has and this node lacks", _pipe_lag),
    Gauge("edgebroker_pipe_last_success_timestamp_seconds", "gauge",
          "when the parent last answered, by this machine's clock; 0: not since this start", _last_heard),
    Gauge("edgebroker_pipe_children", "gauge", "children that are connected",
          lambda node: len(node.downstream.children)),
    Gauge("edgebroker_disk_days_left", "gauge",
          "days until the disk is full at today's rate; missing while it is not filling up", _disk_days),
)  # fmt: skip
