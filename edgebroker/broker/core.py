"""Publishing and delivery put together, without any protocol: what every kind of session works with."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from edgebroker.broker.delivery.dead_letters import DeadLetters
from edgebroker.broker.delivery.groups import Groups
from edgebroker.broker.delivery.leases import LeaseLimits, Leases
from edgebroker.broker.delivery.membership import Membership
from edgebroker.broker.delivery.push import Push
from edgebroker.broker.delivery.rebase import CursorRebase
from edgebroker.broker.delivery.refresh import Refreshes
from edgebroker.broker.delivery.snapshot_writer import SnapshotWriter
from edgebroker.broker.delivery.table_snapshots import TableSnapshots
from edgebroker.broker.observe.limits import ReachedLimits
from edgebroker.broker.observe.metrics import Metrics
from edgebroker.broker.publish.producers import Producers
from edgebroker.broker.publish.publishing import Publishing, PublishLimits
from edgebroker.common.config import Config
from edgebroker.common.runtime.clock import Clock
from edgebroker.common.runtime.scheduler import Scheduler
from edgebroker.common.types import TopicSettings
from edgebroker.storage.engine import Engine


class Core(msgspec.Struct, frozen=True, kw_only=True):
    """Owned by the loop thread."""

    engine: Engine
    metrics: Metrics
    limits: ReachedLimits
    publishing: Publishing
    producers: Producers
    groups: Groups
    push: Push
    refreshes: Refreshes
    leases: Leases
    membership: Membership
    table_snapshots: TableSnapshots
    snapshot_writer: SnapshotWriter
    rebase: CursorRebase


def build_core(
    engine: Engine, scheduler: Scheduler, clock: Clock, publish_limits: PublishLimits, lease_limits: LeaseLimits
) -> Core:
    """The core over an engine that is not opened yet."""
    metrics = Metrics()
    limits = ReachedLimits(scheduler, metrics)
    groups = Groups(engine)
    publishing = Publishing(engine, scheduler, metrics, limits, publish_limits)
    producers = Producers(engine)
    push = Push(engine, scheduler, metrics, lease_limits.timeout)
    refreshes = Refreshes(engine, groups, push, metrics)
    dead_letters = DeadLetters(engine, publishing, clock)
    leases = Leases(engine, groups, push, refreshes, dead_letters, scheduler, metrics, lease_limits)
    table_snapshots = TableSnapshots(engine, publishing, refreshes, scheduler, metrics, producers.connected)
    return Core(
        engine=engine,
        metrics=metrics,
        limits=limits,
        publishing=publishing,
        producers=producers,
        groups=groups,
        push=push,
        refreshes=refreshes,
        leases=leases,
        membership=Membership(engine, leases, scheduler, metrics),
        table_snapshots=table_snapshots,
        snapshot_writer=SnapshotWriter(engine, publishing, table_snapshots, scheduler),
        rebase=CursorRebase(engine, groups, leases, push, refreshes),
    )


def publish_limits(config: Config) -> PublishLimits:
    """Those of a node with this configuration."""
    limits, topics = config.limits, config.topics
    return PublishLimits(
        limits.staged_high_bytes,
        limits.staged_high_bytes // 2,
        limits.max_record_bytes,
        limits.max_inflated_bytes,
        limits.max_partitions,
        topics.auto_create,
        bool(config.pipe.parents or config.pipe.registry),
        limits.replicated_timeout_ms / 1000,
        TopicSettings(kind=topics.kind, partitions=topics.partitions),
    )


def lease_limits(config: Config) -> LeaseLimits:
    """Those of a node with this configuration."""
    pace = config.delivery
    return LeaseLimits(pace.timeout_ms / 1000, pace.backoff_ms / 1000, pace.max_backoff_ms / 1000, pace.max_attempts)


def problems_of(core: Core, held: Callable[[], list[str]]) -> dict[str, str]:
    """What is wrong with the engine and the core, by name; `held` says who holds most of what fills the disk."""
    found = {**core.engine.problems(), **core.limits.problems()}
    if "disk_full" in found and (holders := held()):
        found["disk_full"] += f"; held: {'; '.join(holders)}"
    publishing = core.publishing
    if publishing.lost:
        found["history_lost"] = "; ".join(one.why for one in publishing.lost.values())
    unwritten = core.snapshot_writer.failed
    if unwritten:
        found["snapshot_failed"] = "; ".join(f"{topic}: {why}" for topic, why in sorted(unwritten.items()))
    if publishing.fenced:
        names = ", ".join(sorted({log.topic for log in publishing.fenced})[:10])
        writers = ", ".join(sorted(set(publishing.fenced.values())))
        found["superseded"] = f"{names}: written by {writers} now, which was promoted"
    return found
