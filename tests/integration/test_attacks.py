"""A part of `make test-attack`: the attacks whose outcome is no matter of time, and some of the others, shortly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.attack.rows import ATTACKS, Attack
from tests.attack.stand import Stand

pytestmark = pytest.mark.slow
# What is measured there, and takes long.
MEASURED = {"4", "5", "6", "7", "9", "15", "19"}
SOME = ["20 connections of stale acknowledgements", "1,000 unfinished frames within the limit", "66,000 invented nodes"]


@pytest.mark.parametrize("attack", [one for one in ATTACKS if one.number not in MEASURED], ids=lambda one: one.what)
def test_it_is_refused_or_harmless(attack: Attack, tmp_path: Path) -> None:
    with Stand.started(tmp_path, 1.0, attack.descriptors) as stand:
        figure, held = attack.run(stand)
    assert held, figure


@pytest.mark.parametrize("what", SOME)
def test_honest_users_go_on(what: str, tmp_path: Path) -> None:
    """How long they wait is measured by `make test-attack`: here, that they are served, and with how much memory."""
    attack = next(one for one in ATTACKS if one.what == what)
    with Stand.started(tmp_path, 1.0, attack.descriptors) as stand:
        attack.run(stand)
        assert stand.child_follows
        assert stand.felt.memory - stand.quiet.memory < 64
