"""The suite runs against the built extensions, never against anything else. Fixtures of several files."""

import importlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit import watchdog
from tests.kit.fleet_nodes import Fleet
from tests.kit.trees import Tree

EXTENSIONS = (
    "edgebroker.common.answers",
    "edgebroker.common.crc32c",
    "edgebroker.common.records",
    "edgebroker.client.publish.accumulator",
    "edgebroker.consumer.handling.interruption",
    "edgebroker.network.wire.framing",
    "edgebroker.network.io.sendpath",
    "edgebroker.storage.commit.groupcommit",
    "edgebroker.storage.log.segscan",
    "edgebroker.storage.log.staging",
    "edgebroker.cli.bench.native_client",
)

# Machines are booted there, which takes minutes: `make test-appliance`.
collect_ignore = [] if os.environ.get("EB_APPLIANCE") else ["appliance"]


def pytest_configure(config: pytest.Config) -> None:
    for name in EXTENSIONS:
        path = importlib.import_module(name).__file__ or ""
        if not path.endswith(".so"):
            raise pytest.UsageError(f"{name} is {path}, not a built extension; run make build")
    watchdog.install()


@pytest.fixture(autouse=True)
def no_callback_keeps_a_loop() -> Iterator[None]:
    watchdog.found.clear()
    yield
    assert not watchdog.found


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    found = Tree(tmp_path)
    yield found
    found.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    found = Fleet(tmp_path)
    yield found
    found.close()
