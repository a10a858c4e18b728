"""`edgebroker backup DIR`: copy the logs of a running node.

The node answers which files its logs consist of, and how much of each is durable; those bytes never change. Sealed
segments are linked, or copied to another file system; active ones are copied up to their high watermark. The manifest,
BACKUP, is written last: a copy without it is incomplete.
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
from edgebroker.cli.command import Parser, admin_flag, json_flag
from edgebroker.cli.render import counted, size
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.storage import copies, files
from edgebroker.storage.identity import write_identity
from edgebroker.storage.metadata.meta_db import write_offsets_snapshot
from edgebroker.storage.metadata.registry import FILE as REGISTRY
from edgebroker.storage.metadata.registry import copy_registry
from edgebroker.storage.rewrite.removal import read_tombstones, write_tombstones
from edgebroker.storage.types import GroupOffset, Identity

MANIFEST = "BACKUP"
TRIES = 5


class CopiedLog(msgspec.Struct):
    """How far a log goes in a copy: its end offset, and the bytes of its segments."""

    end: int
    bytes: int


class Manifest(msgspec.Struct):
    """The content of BACKUP: when it was made, of which node, and what it has by TOPIC/PARTITION."""

    made_ms: int
    uid: str
    logs: dict[str, CopiedLog]


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=backup)
    parser.description = (
        "Copy the logs, committed offsets and identity of a running node on this machine. On the same file system "
        "sealed segments are hard links and take no space."
    )
    parser.add_argument("directory", help="a new directory, preferably on another disk")
    admin_flag(parser)
    json_flag(parser)


def backup(options: argparse.Namespace) -> int:
    target = Path(options.directory)
    must_be_empty(target)
    for attempt in range(TRIES):
        found = call(options.admin, "GET", "/v1/backup")
        files.make_directory(target)
        try:
            copied = _copy(Path(found["data_dir"]), target, found)
            break
        except FileNotFoundError as error:
            # Retention removed a segment meanwhile: begin again with what is there now.
            if attempt == TRIES - 1:
                raise EdgeBrokerError(
                    f"retention removes segments faster than they are copied ({error}); try again"
                ) from error
            shutil.rmtree(target / "topics", ignore_errors=True)
    result = {"directory": str(target), "logs": len(found["logs"]), "bytes": copied}
    text = f"{target}: {counted(len(found['logs']), 'log')}, {size(copied)}"
    print(json.dumps(result) if options.json else text)
    return 0


def must_be_empty(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} is not empty; choose a directory that does not exist")


def _copy(source: Path, target: Path, found: dict[str, Any]) -> int:
    """Copy everything; the bytes of all logs. Raises FileNotFoundError when retention removed a file meanwhile."""
    logs: dict[str, CopiedLog] = {}
    for log in found["logs"]:
        name = f"{log['topic']}/{log['partition']}"
        into, directory = copies.log_directory(target, name), copies.log_directory(source, name)
        files.make_directory(into)
        write_identity(into, msgspec.convert(log["identity"], Identity))
        for segment in log["segments"]:
            path = copies.segment_file(directory, segment["file"])
            copies.no_links(source, path)
            _link_or_copy(path, into / path.name, segment["bytes"], segment["sealed"])
        files.sync_directory(into)
        logs[name] = CopiedLog(log["end"], sum(segment["bytes"] for segment in log["segments"]))
    offsets = {
        (group, topic, partition): msgspec.convert(fields, GroupOffset)
        for group, topic, partition, fields in found["offsets"]
    }
    write_offsets_snapshot(target / "offsets.snap", offsets)
    tombstones = read_tombstones(source)
    if tombstones:
        write_tombstones(target, tombstones)
    registry = source / REGISTRY
    if registry.exists():
        copy_registry(registry, target / REGISTRY)
    for name in ("FORMAT", "node"):
        copies.no_links(source, source / name)
        files.write_durable(target / name, (source / name).read_bytes())
    manifest = Manifest(SystemClock().wall_ms(), found["uid"], logs)
    files.write_durable(target / MANIFEST, msgspec.json.encode(manifest) + b"\n")
    return sum(part.bytes for part in logs.values())


def _link_or_copy(path: Path, target: Path, length: int, sealed: bool) -> None:
    """Link a sealed file that is durable as a whole; copy the first `length` bytes of any other."""
    with open(copies.open_file(path), "rb") as file:
        if sealed and path.stat().st_size == length:
            try:
                os.link(path, target, follow_symlinks=False)
                return
            except OSError as error:
                if error.errno not in (errno.EXDEV, errno.EPERM, errno.EOPNOTSUPP, errno.EMLINK):
                    raise
        files.copy_start(file.fileno(), target, length)
