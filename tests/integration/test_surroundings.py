"""A node starts, whatever surrounds it (tests/kit/surroundings.py); the appliance tests do the same to the one file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from edgebroker.common.config import load_config, warnings
from tests.kit.surroundings import KUBERNETES, SURROUNDINGS, Surroundings, check

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("surroundings", SURROUNDINGS, ids=lambda one: one.name)
def test_it_starts(surroundings: Surroundings, tmp_path: Path) -> None:
    check([sys.executable, "-m", "edgebroker"], surroundings, tmp_path)


def test_variables_of_others_are_no_settings() -> None:
    assert load_config(None, None, {**KUBERNETES, "EDGEBROKER_LOG_LEVEL": ""}) == load_config(None, None, {})
    assert warnings(KUBERNETES) == []
    assert warnings({"EDGEBROKER_SERVER": "a", "EDGEBROKER_NODE_NAME": "a", "HOME": "/"}) == []
    assert warnings({"EDGEBROKER_NODE_NAMES": "a"}) == [
        "environment variable EDGEBROKER_NODE_NAMES is ignored: [node] has no key names (did you mean name?)"
    ]
