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
    "client": {"common", "network"},
    "pipe": {"common"},
    "broker": {"common", "storage", "network", "pipe", "version"},
    "cli": {"common", "storage", "network", "client", "pipe", "broker", "version"},
}

# Modules and calls that only these files may use.
HOMES = {
    "selectors": {"network/io/loop.py"},
    "sqlite3": {
        "storage/metadata/meta_db.py",
        "storage/metadata/metadata.py",
        "storage/metadata/registry.py",
        "storage/metadata/database.py",
        "cli/commands/selftest.py",
    },
    "mmap": {"storage/log/walk.py"},
    "fcntl": {"storage/files.py", "network/io/channel.py", "cli/appliance/upgrade.py"},
    "threading.Thread": {"common/threads.py"},
    "os.fsync": {"common/durable.py", "storage/files.py"},
    "os.fdatasync": {"storage/files.py", "cli/bench/disk.py"},
    "os.pwrite": {"storage/files.py", "cli/bench/disk.py"},
    "os.pread": {"storage/files.py"},
    "os.rename": {"common/durable.py", "storage/files.py"},
    "os.ftruncate": {"storage/files.py"},
    "os.environ": {"common/config.py", "cli/environment.py"},
    "time": {"common/clock.py"},
    "psutil": {"broker/observe/host.py", "cli/bench/target.py"},
    "prometheus_client": {"broker/admin/exposition.py"},
    "h11": {"network/http/server.py", "network/http/client.py"},
}
SOCKETS = {
    "network/io/loop.py", "network/io/channel.py", "network/io/listener.py",
    "network/http/client.py", "client/link.py",  # they connect
    "cli/admin_client.py", "cli/demo/tree_demo.py", "cli/service/supervisor.py", "cli/service/journal.py",
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
