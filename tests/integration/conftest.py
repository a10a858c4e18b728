"""Fixtures of several files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.kit.applications import App
from tests.kit.brokers import RunningBroker
from tests.kit.storage import StoreHarness, filled_store


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[StoreHarness]:
    """A store alone, with a topic of several segments."""
    found = filled_store(tmp_path / "data")
    yield found
    found.close()


@pytest.fixture
def make(broker: RunningBroker, tmp_path: Path) -> Callable[[str], App]:
    """An application of a text, at the broker of the test."""
    return lambda text: App(broker, tmp_path / "application", text)
