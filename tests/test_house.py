"""The architecture as a test: floors import only downwards, siblings are strangers, dangerous calls have one home."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "edgebroker"

# A folder may import itself and what stands beside its name here.
MAY_IMPORT = {
    "common": set(),
    "storage": {"common", "version"},
    "network": {"common"},
    "pipe": {"common"},
    "broker": {"common", "storage", "network", "pipe", "version"},
    "cli": {"common", "storage", "network", "pipe", "broker", "version"},
}

# Modules and calls that only these files may use.
HOMES = {
    "selectors": {"network/loop.py"},
    "sqlite3": {
        "storage/meta.py",
        "storage/metadata.py",
        "storage/registry.py",
        "storage/database.py",
        "cli/selftest.py",
    },
    "mmap": {"storage/walk.py"},
    "fcntl": {"storage/files.py", "network/transport.py", "cli/upgrade.py"},
    "threading.Thread": {"common/threads.py"},
    "os.fsync": {"common/durable.py", "storage/files.py"},
    "os.fdatasync": {"storage/files.py", "cli/disk.py"},
    "os.pwrite": {"storage/files.py", "cli/disk.py"},
    "os.pread": {"storage/files.py"},
    "os.rename": {"common/durable.py", "storage/files.py"},
    "os.ftruncate": {"storage/files.py"},
    "os.environ": {"common/config.py", "cli/main.py", "cli/process.py", "cli/serve.py"},
    "time": {"common/clock.py"},
    "psutil": {"broker/machine.py", "cli/targetbench.py"},
    "prometheus_client": {"broker/exposition.py"},
    "h11": {"network/http.py", "network/httpclient.py"},
}
SOCKETS = {
    "network/loop.py", "network/transport.py", "network/http.py", "network/httpclient.py", "network/link.py",
    "network/producer.py", "network/consumer.py", "broker/broker.py", "broker/session.py", "cli/adminclient.py",
    "broker/tree.py", "cli/treedemo.py", "common/config.py", "cli/supervisor.py", "cli/journal.py",
}  # fmt: skip
HOMES["socket"] = SOCKETS
MOST_LINES = 600


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_floors(path: Path) -> None:
    floor = path.relative_to(PACKAGE).parts[0]
    if floor not in MAY_IMPORT:
        return
    allowed = MAY_IMPORT[floor] | {floor}
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "edgebroker" and len(parts) > 1:
            assert parts[1] in allowed, f"{floor}/ may not import {name}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_homes(path: Path) -> None:
    here = str(path.relative_to(PACKAGE))
    tree = ast.parse(path.read_text())
    used = set(imports(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            used.add(f"{node.value.id}.{node.attr}")
    for name, homes in HOMES.items():
        if name in used:
            assert here in homes, f"{name} belongs to {', '.join(sorted(homes))}"


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_extensions_are_leaves() -> None:
    """A .pyx imports nothing of ours at run time: a frozen program could not see it."""
    for path in sorted((ROOT / "cext").glob("*.pyx")):
        for line in path.read_text().splitlines():
            if line.startswith(("import ", "from ")) and "cimport" not in line:
                raise AssertionError(f"{path.name}: {line}")


def test_every_extension_has_its_interface() -> None:
    for path in sorted((ROOT / "cext").glob("*.pyx")):
        assert list(PACKAGE.rglob(f"{path.stem}.pyi")), f"{path.name} has no .pyi"
