"""`edgebroker support-bundle`: diagnostics of a node in one archive, without records or secrets."""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import re
import tarfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec

from edgebroker.cli.admin_client import ask
from edgebroker.cli.appliance.host import Machine, readable_errors
from edgebroker.common.config import load_config
from edgebroker.common.errors import ConfigError, EdgeBrokerError, UnreachableError
from edgebroker.common.runtime.text_file import read_text
from edgebroker.version import __version__

PATHS = (
    "/healthz", "/readyz", "/v1/node", "/v1/topics", "/v1/groups", "/v1/clients", "/v1/pipe", "/v1/tree", "/v1/resyncs",
)  # fmt: skip
COMMANDS = {
    "journal.txt": ("journalctl", "-u", "edgebroker*", "-n", "5000", "--no-pager", "-o", "short-iso"),
    "units.txt": ("systemctl", "status", "edgebroker*", "--no-pager", "-l"),
    "unit-files.txt": ("systemctl", "cat", "edgebroker*", "--no-pager"),
    "disk-free.txt": ("df", "-h"),
    "disk-inodes.txt": ("df", "-i"),
    "kernel.txt": ("dmesg", "--level", "err,warn"),
    "processes.txt": ("ps", "-C", "edgebroker", "-o", "pid,ppid,rss,nlwp,etimes,stat,args"),
}
# The values of keys, variables and arguments with such names are replaced.
_WORDS = r"[\w-]*(?:password|passwd|secret|token|credential|private[_-]key|api[_-]key)[\w-]*"
_SECRETS = (
    re.compile(rf'(?i)("?\b{_WORDS}"?\s*[=:]\s*)("(?:[^"\\\n]|\\.)*"|[^\s,;}}]+(?:[^\S\n][^\n,}}]*)?)'),
    re.compile(rf"(?i)(--{_WORDS}\s+)(\S+)"),
    re.compile(r"(?i)(\b(?:authorization|proxy-authorization)\b\W+(?:\w+\s+)?)(\S+)"),
    re.compile(r"(?i)(\bbearer\s+)(\S+)"),
)
_URL_PASSWORD = re.compile(r"(://[^/\s:@]+:)[^@\s]+(@)")


def support_bundle(options: argparse.Namespace) -> int:
    when = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    path = Path(options.file or f"edgebroker-{platform.node()}-{when}.tar.gz")
    machine = Machine(Path("/"), dry=False, quiet=True)
    missing: list[str] = []
    if path.exists():
        raise ConfigError(f"{path} already exists; choose another name")
    opener = partial(os.open, mode=0o600)
    with readable_errors(), open(path, "xb", opener=opener) as file, tarfile.open(fileobj=file, mode="w:gz") as bundle:

        def add(name: str, text: str) -> None:
            data = redacted(text).encode()
            entry = tarfile.TarInfo(f"edgebroker-bundle/{name}")
            entry.size, entry.mode = len(data), 0o600
            bundle.addfile(entry, io.BytesIO(data))

        add("about.json", json.dumps({"version": __version__, "when": when, "machine": platform.uname()._asdict()}))
        for url in PATHS:
            try:
                status, answer = ask(options.admin, url)
            except UnreachableError as error:
                missing.append(f"{url}: {error}")
                continue
            add(f"http{url.replace('/', '-')}.json", json.dumps({"status": status, "answer": answer}, indent=1))
        for name, command in COMMANDS.items():
            text = machine.ask(*command, always=True)
            add(name, text) if text else missing.append(f"{name}: {' '.join(command)} printed nothing")
        configs = [Path(options.config)] if options.config else sorted(Path("/etc/edgebroker").glob("*.toml"))
        for config in configs:
            _add_config(config, add, missing)
        if not configs:
            missing.append("configuration and files: none in /etc/edgebroker; name it with -c FILE")
        add("missing.txt", "\n".join(missing) + "\n")
    print(path)
    return 0


def _add_config(path: Path, add: Callable[[str, str], None], missing: list[str]) -> None:
    """Add a configuration file, the configuration in force, and the list of files in its data directory."""
    environment = Path("/etc/default") / ("edgebroker" if path.stem == "edgebroker" else f"edgebroker-{path.stem}")
    try:
        add(f"config-{path.name}", read_text(path))
        found = read_text(environment) if environment.exists() else ""
        add(f"environment-{path.stem}.txt", found)
        set_there = [line.partition("=") for line in found.splitlines() if not line.startswith("#")]
        config = load_config(path, environment={name.strip(): value.strip(" \"'") for name, _, value in set_there})
    except (OSError, EdgeBrokerError) as error:
        missing.append(f"{path}: {error}")
        return
    add(f"effective-{path.stem}.json", json.dumps(msgspec.to_builtins(config), indent=1))
    data, lines = Path(config.node.data_dir), []
    for file in sorted(data.rglob("*")):
        try:
            lines.append(f"{file.stat().st_size:14} {file.relative_to(data)}")
        except OSError:
            continue  # removed meanwhile
    add(f"files-{path.stem}.txt", "\n".join(lines))


def redacted(text: str) -> str:
    """The text with everything that looks like a secret replaced by ***."""
    for pattern in _SECRETS:
        text = pattern.sub(r"\1***", text)
    return _URL_PASSWORD.sub(r"\1***\2", text)
