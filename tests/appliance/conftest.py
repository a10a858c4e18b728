"""Machines are made once for the file that uses them; what they said is kept when something fails."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from .builds import FOLDER, PLACE, PROGRAM
from .machine import keep_journals, unavailable


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    report = yield
    if report.failed:  # type: ignore[attr-defined]
        keep_journals(PLACE / "journals", item.name)
    return report


@pytest.fixture(scope="session")
def program() -> Path:
    """The one file."""
    if why := unavailable():
        pytest.skip(why)
    assert PROGRAM.exists(), "make freeze comes first"
    return PROGRAM


@pytest.fixture(scope="session")
def folder() -> Path:
    assert (FOLDER / "edgebroker").exists(), "make freeze comes first"
    return FOLDER
