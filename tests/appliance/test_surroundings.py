"""The one file starts, whatever surrounds it."""

from pathlib import Path

import pytest

from tests.kit.surroundings import SURROUNDINGS, Surroundings, check


@pytest.mark.parametrize("surroundings", SURROUNDINGS, ids=lambda one: one.name)
def test_it_starts(surroundings: Surroundings, program: Path, tmp_path: Path) -> None:
    check([str(program)], surroundings, tmp_path)
