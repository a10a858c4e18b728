"""Fixtures of several files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.storage import StoreHarness, filled_store


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[StoreHarness]:
    """A store alone, with a topic of several segments."""
    found = filled_store(tmp_path / "data")
    yield found
    found.close()
