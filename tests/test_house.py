"""The architecture as a test: floors and packages import only downwards, nothing imports in a circle, folders and
files stay small, dangerous calls have one home, and a name means one thing.

Imports under TYPE_CHECKING and within functions count like all others.
"""

import ast
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "edgebroker"

# A floor may import itself and what stands beside its name here.
MAY_IMPORT = {
    "common": set(),
    "storage": {"common", "version"},
    "network": {"common"},
    "client": {"common", "network", "trust"},
    "pipe": {"common"},
    "trust": {"common", "version"},
    "broker": {"common", "storage", "network", "pipe", "trust", "version"},
    "consumer": {"common", "storage", "network", "client", "version"},
    "cli": {"common", "storage", "network", "client", "pipe", "trust", "broker", "consumer", "version"},
}
TOP = ("__init__.py", "__main__.py", "version.py")
# Within a floor a package imports only what stands before it.
LINES = {
    "network": ["wire", "io", "http"],
    "trust": [
        "node_name", "directory", "token", "keys", "certificates", "messages", "contexts", "records", "issuing",
        "joining", "worker",
    ],
    "storage": [
        "types", "files", "copies", "quarantine", "directory", "checksummed", "identity", "log", "metadata", "commit",
        "opening", "settings", "engine", "upkeep", "rewrite", "memory", "store",
    ],
    "client": [
        "arguments", "lifetime", "servers", "credentials", "link", "refresh", "consume", "publish", "consumer",
        "producer", "asynchronous",
    ],
    "consumer": [
        "config", "declare", "database", "reader", "views", "staging_file", "handling", "loaded_records",
        "subscriptions", "reloads", "generation", "copy", "instance", "rest", "service",
    ],
    "broker": [
        "ports", "reading", "observe", "publish", "delivery", "core", "sending", "trust", "access", "sessions", "feed",
        "mirror", "topic_deletion", "holders", "fleet", "admin", "listeners", "engine_events", "engines", "reload",
        "broker",
    ],
    "cli": [
        "environment", "token_argument", "admin_client", "render", "totals", "progress", "pace", "config_file",
        "csv_file", "command", "broker_process", "main", "service", "appliance", "bench", "demo", "commands",
    ],
}  # fmt: skip
# These speak no protocol: packed facts in, packed facts out.
CORE = ["broker/ports.py", "broker/reading.py", "broker/core.py", "broker/observe", "broker/publish", "broker/delivery"]

# Modules and calls that only these files may use.
HOMES = {
    "selectors": {"network/io/loop.py"},
    "sqlite3": {
        "storage/metadata/meta_db.py",
        "storage/metadata/metadata.py",
        "storage/metadata/registry.py",
        "storage/metadata/database.py",
        "consumer/database.py",
        "consumer/reader.py",
        "consumer/views.py",
        "consumer/staging_file.py",
        "cli/commands/selftest.py",
        "trust/issuing.py",
    },
    "ssl": {
        "cli/commands/selftest.py",
        "network/io/tls.py",
        "trust/contexts.py",
        "trust/joining.py",
        "broker/trust/node_trust.py",
        "client/credentials.py",
    },
    "cryptography": {"trust/keys.py", "trust/certificates.py"},
    "mmap": {"storage/log/walk.py"},
    "fcntl": {"storage/files.py", "network/io/channel.py", "cli/appliance/upgrade.py"},
    "threading.Thread": {"common/runtime/threads.py"},
    "os.fsync": {"common/runtime/durable.py", "storage/files.py"},
    "os.fdatasync": {"storage/files.py", "cli/bench/disk.py"},
    "os.pwrite": {"storage/files.py", "cli/bench/disk.py"},
    "os.pread": {"storage/files.py"},
    "os.rename": {"common/runtime/durable.py", "storage/files.py"},
    "os.ftruncate": {"storage/files.py"},
    "os.environ": {"common/config.py", "cli/environment.py", "client/credentials.py"},
    "time": {"common/runtime/clock.py"},
    "psutil": {"broker/observe/host.py", "cli/bench/target.py"},
    "prometheus_client": {"broker/admin/exposition.py", "consumer/rest/metrics.py"},
    "httptools": {"network/http/request_reader.py", "network/http/client.py"},
}
SOCKETS = {
    "network/io/loop.py", "network/io/channel.py", "network/io/listener.py",
    "network/io/tls.py", "network/http/client.py", "network/http/peers.py", "client/credentials.py",
    "client/link.py",  # they connect
    "broker/listeners.py", "broker/trust/helper.py",
    "cli/admin_client.py", "cli/demo/tree_demo.py", "cli/service/supervisor.py", "cli/service/journal.py",
}  # fmt: skip
HOMES["socket"] = SOCKETS
MOST_LINES = 600
MOST_FILES = 12
ROOT_LINES = 250


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def imports(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "import by the whole name"
            yield node.module
            for alias in node.names:
                yield f"{node.module}.{alias.name}"


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


@cache
def graph() -> dict[str, set[str]]:
    """Which of our modules imports which."""
    names = {module_name(path): path for path in sources()}
    found = {}
    for name, path in names.items():
        found[name] = {imported for imported in imports(ast.parse(path.read_text())) if imported in names} - {name}
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_floors(path: Path) -> None:
    floor = path.relative_to(PACKAGE).parts[0]
    if floor in TOP:
        return
    allowed = MAY_IMPORT[floor] | {floor}
    for name in imports(ast.parse(path.read_text())):
        parts = name.split(".")
        if parts[0] == "edgebroker" and len(parts) > 1:
            assert parts[1] in allowed, f"{floor}/ may not import {name}"


@pytest.mark.parametrize("floor", LINES)
def test_packages_stand_in_a_line(floor: str) -> None:
    line = LINES[floor]
    present = {
        path.stem for path in (PACKAGE / floor).iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert present - {"__init__"} == set(line)
    for name, imported in graph().items():
        parts = name.split(".")
        if parts[1:2] != [floor] or len(parts) < 3:
            continue
        for other in imported:
            room = other.split(".")[2:3]
            if other.split(".")[1] == floor and room and room != parts[2:3]:
                assert line.index(room[0]) < line.index(parts[2]), f"{name} may not import {other}"


def test_nothing_imports_in_a_circle() -> None:
    """Take away what imports nothing that is left: whatever remains imports in a circle."""
    left = {name: set(imported) for name, imported in graph().items()}
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    assert not left


@pytest.mark.parametrize("place", CORE)
def test_the_core_speaks_no_protocol(place: str) -> None:
    start = PACKAGE / place
    for path in [start] if start.suffix else sorted(start.rglob("*.py")):
        for name in imports(ast.parse(path.read_text())):
            assert not name.startswith(("edgebroker.network", "edgebroker.pipe")), f"{path.name} imports {name}"


def test_folders_stay_small() -> None:
    """A folder answers one question. The commands are a list that users know."""
    for folder in [PACKAGE, *(path for path in PACKAGE.rglob("*") if path.is_dir())]:
        files = [path for path in folder.glob("*.py") if path.name != "__init__.py"]
        if folder != PACKAGE / "cli" / "commands":
            assert len(files) <= MOST_FILES, f"{folder.relative_to(ROOT)} has {len(files)} files"


def test_a_class_name_means_one_thing() -> None:
    names = Counter(
        node.name
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    )
    assert [name for name, count in names.items() if count > 1] == []


def test_the_composition_root_only_composes() -> None:
    path = PACKAGE / "broker" / "broker.py"
    assert len(path.read_text().splitlines()) <= ROOT_LINES
    # Only who runs a node knows all of it.
    users = {name for name, imported in graph().items() if "edgebroker.broker.broker" in imported}
    assert users == {"edgebroker.cli.service.serve"}


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


def test_nothing_is_imported_that_the_program_in_one_file_leaves_out() -> None:
    """packaging/edgebroker.spec excludes what others would pull in; a verb that needs one of these fails there only."""
    spec = ast.parse((ROOT / "packaging" / "edgebroker.spec").read_text())
    [names] = [
        ast.literal_eval(node.value)
        for node in spec.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXCLUDED"
    ]
    assert "multiprocessing" in names
    for path in sources():
        found = {*imports(ast.parse(path.read_text()))}
        assert not {*found, *(one.split(".")[0] for one in found)} & {*names}, path


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= MOST_LINES


def test_extensions_are_leaves() -> None:
    """A .pyx imports nothing of ours at run time: a frozen program could not see it."""
    for path in sorted((ROOT / "cext").glob("*.pyx")):
        for line in path.read_text().splitlines():
            if line.lstrip().startswith(("import ", "from ")) and "cimport" not in line:
                raise AssertionError(f"{path.name}: {line}")


def test_every_extension_has_its_interface() -> None:
    for path in sorted((ROOT / "cext").glob("*.pyx")):
        assert list(PACKAGE.rglob(f"{path.stem}.pyi")), f"{path.name} has no .pyi"
