"""Fixtures of several files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.storage import Start, StoreHarness, store_settings


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    opened: list[StoreHarness] = []

    def begin(**settings: int | float) -> StoreHarness:
        opened.append(StoreHarness(tmp_path / "data", store_settings(**settings)))  # type: ignore[arg-type]
        opened[-1].create()
        return opened[-1]

    yield begin
    for harness in opened:
        harness.close()
