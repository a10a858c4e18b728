"""`edgebroker restore DIR --data-dir NEW`: create a data directory from a backup.

A restored node begins a new epoch of every log that it writes before it accepts records, because its history may differ
from the one that others have replicated since the backup.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from edgebroker.cli.command import Parser, json_flag
from edgebroker.cli.commands.backup import MANIFEST, must_be_empty
from edgebroker.cli.render import counted
from edgebroker.common.errors import ConfigError, DamagedDataError
from edgebroker.storage import files
from edgebroker.storage.directory import RESTORED
from edgebroker.storage.metadata.registry import FILE as REGISTRY
from edgebroker.storage.metadata.registry import copy_registry
from edgebroker.storage.rewrite.removal import read_tombstones, write_tombstones


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=restore)
    parser.add_argument("directory", help="a directory that edgebroker backup wrote")
    parser.add_argument("--data-dir", required=True, metavar="DIR", help="the new data directory")
    parser.add_argument(
        "--preload",
        action="store_true",
        help="restore the logs without the identity, to give a new node a head start",
    )
    json_flag(parser)


def restore(options: argparse.Namespace) -> int:
    source, target = Path(options.directory), Path(options.data_dir)
    try:
        manifest = json.loads((source / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{source} is not a complete backup: {MANIFEST}: {reason}") from error
    must_be_empty(target)
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
            raise DamagedDataError(
                f"{source}: the log {name} has {size} bytes instead of {part['bytes']}; use another backup"
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
        files.write_durable(building / RESTORED, b"")
    if target.exists():
        target.rmdir()
    files.move(building, target)
    verb = "preloaded; the node gets an identity of its own" if options.preload else "restored"
    result = {"data_dir": str(target), "logs": len(manifest["logs"]), "preload": options.preload}
    text = f"{target}: {counted(len(manifest['logs']), 'log')} {verb}"
    print(json.dumps(result) if options.json else text)
    return 0
