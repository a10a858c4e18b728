"""`edgebroker backup DIR` of a running node, and `edgebroker restore DIR --data-dir NEW`.

The node tells which files its logs consist of and how much of each is durable; those bytes never change. Sealed
segments are linked (or copied to another file system), the active ones copied up to their durable end. BACKUP is
written last: a copy without it is not whole. A restored node begins a new history of every log that it writes, before
it takes anything.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import msgspec

from edgebroker.cli.admin_client import call
from edgebroker.common.clock import SystemClock
from edgebroker.common.errors import ConfigError, DamagedDataError, EdgeBrokerError
from edgebroker.storage import files
from edgebroker.storage.directory import RESTORED
from edgebroker.storage.identity import write_identity
from edgebroker.storage.metadata.meta_db import write_offsets_snapshot
from edgebroker.storage.metadata.registry import FILE as REGISTRY
from edgebroker.storage.metadata.registry import copy_registry
from edgebroker.storage.rewrite.removal import read_tombstones, write_tombstones
from edgebroker.storage.types import GroupOffset, Identity

MANIFEST = "BACKUP"
TRIES = 5


def backup(options: argparse.Namespace) -> int:
    target = Path(options.directory)
    _must_be_empty(target)
    for attempt in range(TRIES):
        found = call(options.admin, "GET", "/v1/backup")
        try:
            size = _copy(Path(found["data_dir"]), target, found)
            break
        except FileNotFoundError as error:
            # Retention removed a segment meanwhile: take what there is now.
            if attempt == TRIES - 1:
                raise EdgeBrokerError(f"the logs change faster than they are copied: {error}") from error
            shutil.rmtree(target)
    result = {"directory": str(target), "logs": len(found["logs"]), "bytes": size}
    print(json.dumps(result) if options.json else f"{target}: {result['logs']} logs, {size} bytes")
    return 0


def restore(options: argparse.Namespace) -> int:
    source, target = Path(options.directory), Path(options.data_dir)
    try:
        manifest = json.loads((source / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError(f"{source} is no whole backup ({error})") from error
    _must_be_empty(target)
    building = target.with_name(target.name + ".restoring")
    shutil.rmtree(building, ignore_errors=True)
    for name, part in manifest["logs"].items():
        into = building / "topics" / name
        files.make_directory(into)
        for path in sorted((source / "topics" / name).iterdir()):
            with path.open("rb") as file:
                files.copy_start(file.fileno(), into / path.name, path.stat().st_size)
        size = sum(path.stat().st_size for path in into.glob("*.log"))
        if size != part["bytes"]:
            raise DamagedDataError(f"{source}: {name} has {size} bytes, not the {part['bytes']} of the backup")
        files.sync_directory(into)
    files.make_directory(building)
    for name in ("FORMAT", "offsets.snap", *(() if options.preload else ("node",))):
        files.write_durable(building / name, (source / name).read_bytes())
    tombstones = read_tombstones(source)
    if tombstones:
        write_tombstones(building, tombstones)
    if not options.preload:
        if (source / REGISTRY).exists():
            copy_registry(source / REGISTRY, building / REGISTRY)
        files.write_durable(building / RESTORED, b"")
    if target.exists():
        target.rmdir()
    files.move(building, target)
    what = "preloaded, under an identity of its own" if options.preload else "restored"
    result = {"data_dir": str(target), "logs": len(manifest["logs"]), "preload": options.preload}
    print(json.dumps(result) if options.json else f"{target}: {len(manifest['logs'])} logs {what}")
    return 0


def _must_be_empty(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not empty; name a directory that does not exist")


def _copy(source: Path, target: Path, found: dict[str, Any]) -> int:
    """The bytes of all logs that are in the copy. Raises FileNotFoundError when a file is gone by now."""
    logs = {}
    for log in found["logs"]:
        name = f"{log['topic']}/{log['partition']}"
        into = target / "topics" / name
        files.make_directory(into)
        write_identity(into, msgspec.convert(log["identity"], Identity))
        for segment in log["segments"]:
            path = source / "topics" / name / segment["file"]
            _take(path, into / segment["file"], segment["bytes"], segment["sealed"])
        files.sync_directory(into)
        logs[name] = {"end": log["end"], "bytes": sum(segment["bytes"] for segment in log["segments"])}
    offsets = {
        (group, topic, partition): msgspec.convert(place, GroupOffset)
        for group, topic, partition, place in found["offsets"]
    }
    files.make_directory(target)
    write_offsets_snapshot(target / "offsets.snap", offsets)
    tombstones = read_tombstones(source)
    if tombstones:
        write_tombstones(target, tombstones)
    registry = source / REGISTRY
    if registry.exists():
        copy_registry(registry, target / REGISTRY)
    for name in ("FORMAT", "node"):
        files.write_durable(target / name, (source / name).read_bytes())
    manifest = {"made_ms": SystemClock().wall_ms(), "uid": found["uid"], "logs": logs}
    files.write_durable(target / MANIFEST, json.dumps(manifest).encode() + b"\n")
    return sum(part["bytes"] for part in logs.values())


def _take(path: Path, target: Path, size: int, sealed: bool) -> None:
    """Link a file that is all durable, else copy so much of it."""
    with path.open("rb") as file:
        if sealed and path.stat().st_size == size:
            try:
                os.link(path, target)
                return
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                    raise
        files.copy_start(file.fileno(), target, size)
