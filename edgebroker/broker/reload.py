"""Configuration keys that can be reloaded while the node runs (SIGHUP); the others need a restart."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from edgebroker.common.config import Config

RELOADABLE = frozenset(
    {
        "log.level",
        "storage.retention_bytes",
        "storage.retention_ms",
        "storage.segment_ms",
        "storage.max_bytes",
        "storage.soft_free_bytes",
        "storage.hard_free_bytes",
        "storage.on_full",
        "storage.hold_ms",
        "storage.hold_bytes",
        "storage.deleted_retention_ms",
        "storage.commit_interval_ms",
        "storage.verify_bytes_per_second",
        "limits.max_connections",
        "limits.per_address_connections",
        "limits.receive_bytes",
        "limits.connect_timeout_ms",
        "limits.stuck_timeout_ms",
        "pipe.bytes_per_second",
        "pipe.hours",
    }
)


class Changes(NamedTuple):
    """Keys whose value is another one: taken over, and waiting for a restart."""

    applied: list[str]
    waiting: list[str]


def merge(old: Config, new: Config) -> tuple[Config, Changes]:
    """The configuration to continue with: what can change is taken over; a key that waits for a restart keeps its old
    value, and is named again by the next reload."""
    old_tree, new_tree = msgspec.to_builtins(old), msgspec.to_builtins(new)
    changed = [
        f"{section}.{key}"
        for section, table in new_tree.items()
        for key, value in table.items()
        if value != old_tree[section][key]
    ]
    applied = [name for name in changed if name in RELOADABLE]
    for name in applied:
        section, _, key = name.partition(".")
        old_tree[section][key] = new_tree[section][key]
    return msgspec.convert(old_tree, Config), Changes(applied, [name for name in changed if name not in RELOADABLE])
