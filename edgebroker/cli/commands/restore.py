"""`edgebroker restore DIR --data-dir NEW`: create a data directory from a backup.

A restored node begins a new epoch of every log that it writes before it accepts records, because its history may differ
from the one that others have replicated since the backup. So nodes that have replicated more are asked first: those of
the registry in the backup, and those that are named.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import msgspec

from edgebroker.cli.admin_client import call
from edgebroker.cli.command import Parser, json_flag
from edgebroker.cli.commands.backup import MANIFEST, Manifest, must_be_empty
from edgebroker.cli.render import counted
from edgebroker.common.errors import ConfigError, DamagedDataError, EdgeBrokerError
from edgebroker.common.runtime.threads import start_thread
from edgebroker.storage import copies, files
from edgebroker.storage.directory import LOSS_ACCEPTED, RESTORED
from edgebroker.storage.identity import read_identity
from edgebroker.storage.metadata.registry import FILE as REGISTRY
from edgebroker.storage.metadata.registry import copy_registry, read_hubs
from edgebroker.storage.rewrite.removal import read_tombstones, write_tombstones

MOST_ASKED = 16


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=restore)
    parser.add_argument("directory", help="a directory that edgebroker backup wrote")
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="the new data directory")
    parser.add_argument(
        "--preload",
        action="store_true",
        help="restore the logs without the identity, to give a new node a head start",
    )
    parser.add_argument(
        "--compare", action="append", default=[], metavar="HOST:PORT", help="ask this node as well what it has"
    )
    parser.add_argument(
        "--accept-loss", action="store_true", help="restore although other nodes have records that the backup lacks"
    )
    json_flag(parser)


def restore(options: argparse.Namespace) -> int:
    source, target = Path(options.directory), Path(options.data_dir)
    manifest = _manifest(source)
    must_be_empty(target)
    if not options.preload:
        _compare(source, manifest, options)
    building = target.with_name(target.name + ".restoring")
    shutil.rmtree(building, ignore_errors=True)
    for name, part in manifest.logs.items():
        into = copies.log_directory(building, name)
        files.make_directory(into)
        for path in copies.files_of(source, copies.log_directory(source, name)):
            with open(copies.open_file(path), "rb") as file:
                files.copy_start(file.fileno(), into / path.name, path.stat().st_size)
        size = sum(path.stat().st_size for path in into.glob("*.log"))
        if size != part.bytes:
            raise DamagedDataError(
                f"{source}: the log {name} has {size} bytes instead of {part.bytes}; use another backup"
            )
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
        files.write_durable(building / RESTORED, LOSS_ACCEPTED if options.accept_loss else b"")
    if target.exists():
        target.rmdir()
    files.move(building, target)
    verb = "preloaded; the node gets an identity of its own" if options.preload else "restored"
    result = {"data_dir": str(target), "logs": len(manifest.logs), "preload": options.preload}
    text = f"{target}: {counted(len(manifest.logs), 'log')} {verb}"
    print(json.dumps(result) if options.json else text)
    return 0


def _manifest(source: Path) -> Manifest:
    """What the backup says that it has, all of whose files are there and are files."""
    try:
        manifest = msgspec.json.decode((source / MANIFEST).read_bytes(), type=Manifest)
        for name in manifest.logs:
            copies.files_of(source, copies.log_directory(source, name))
        for path in source.iterdir():
            copies.no_links(source, path)
    except (OSError, msgspec.DecodeError) as error:
        reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else f"{MANIFEST}: {error}"
        raise ConfigError(f"{source} is not a complete backup: {reason}") from error
    return manifest


def _compare(source: Path, manifest: Manifest, options: argparse.Namespace) -> None:
    """Raises EdgeBrokerError when another node has records that the backup lacks, unless that is accepted."""
    ends: dict[tuple[str, str], int] = {}
    for name, part in manifest.logs.items():
        identity = read_identity(copies.log_directory(source, name))
        if identity.origin == manifest.uid:
            ends[name, identity.log_id] = part.end
    known = read_hubs(source / REGISTRY) if (source / REGISTRY).exists() else []
    nodes = dict.fromkeys([*(address for _, address in known), *options.compare])
    names = {address: f"{name} at {address}" for name, address in known}
    answers = _ask(list(nodes), ends)
    ahead: list[str] = []
    for address in nodes:
        name, more = names.get(address, address), answers[address]
        if more is None:
            print(f"{name} does not answer: what it has is not known", file=sys.stderr)
        elif more:
            ahead.append(f"{name} has {counted(more, 'record')} that the backup lacks")
    if ahead and not options.accept_loss:
        raise EdgeBrokerError(
            f"{'; '.join(ahead)}. Nothing was restored: promote that node instead (edgebroker promote there), or add "
            "--accept-loss"
        )
    for line in ahead:
        print(line, file=sys.stderr)


def _ask(nodes: list[str], ends: dict[tuple[str, str], int]) -> dict[str, int | None]:
    """What each of these has beyond the ends; several are asked at a time, for most of those that are lost time out."""
    answers: dict[str, int | None] = {}

    def ask(some: list[str]) -> None:
        for address in some:
            answers[address] = _more_than(address, ends)

    parts = [nodes[rank::MOST_ASKED] for rank in range(min(len(nodes), MOST_ASKED))]
    for thread in [start_thread("edgebroker-compare", partial(ask, part)) for part in parts]:
        thread.join()
    return answers


def _more_than(address: str, ends: dict[tuple[str, str], int]) -> int | None:
    """How many records a node has beyond these ends; None when it does not answer."""
    try:
        topics = call(address, "POST", "/v1/pipe/topics")["topics"]
    except EdgeBrokerError:
        return None
    more = 0
    for topic in topics:
        for log in topic["partitions"]:
            here = ends.get((f"{topic['name']}/{log['partition']}", log["log_id"]))
            more += max(0, log["durable_end"] - here) if here is not None else 0
    return more
