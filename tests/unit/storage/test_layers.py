"""The packages of storage/ stand in a line, and no module imports itself by way of others, also not for types alone."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STORAGE = ROOT / "edgebroker" / "storage"
# Each may import its own package and what is above it here; within a row, packages are strangers.
LINE = [
    {"types", "settings", "engine", "files", "checksummed", "identity", "quarantine", "directory"},
    {"metadata", "log"},
    {"commit"},
    {"opening"},
    {"upkeep"},
    {"rewrite"},
    {"store", "memory"},
]
RANKS = {name: rank for rank, names in enumerate(LINE) for name in names}
MOST_FILES = 12


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


MODULES = {name_of(path): path for path in STORAGE.rglob("*.py") if path.stem != "__init__"}


def imported(path: Path) -> set[str]:
    """The modules of storage/ that a module imports, wherever in it that is said."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found & MODULES.keys()


def package(module: str) -> str:
    return module.split(".")[2]


@pytest.mark.parametrize("module", sorted(MODULES))
def test_packages_stand_in_a_line(module: str) -> None:
    for other in imported(MODULES[module]):
        same = package(other) == package(module)
        below = RANKS[package(other)] < RANKS[package(module)]
        assert same or below or RANKS[package(module)] == 0, f"{module} imports {other}"


def test_no_circles() -> None:
    TopologicalSorter({module: imported(path) for module, path in MODULES.items()}).prepare()


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES.values()}), ids=lambda path: path.name)
def test_folders_stay_small(folder: Path) -> None:
    assert len([path for path in folder.glob("*.py") if path.stem != "__init__"]) <= MOST_FILES
