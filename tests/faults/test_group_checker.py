"""The checker of groups finds what it is there for."""

from collections.abc import Callable
from pathlib import Path

import pytest

from .checker import PartitionContent, value_of
from .group_checker import LEASES_PER_RUN, Journals, Letter

CONTENT = {0: PartitionContent(0, 6, [(offset, value_of("p", offset, 40)) for offset in range(6)])}
NEXT_RUN = 100 + 2 * LEASES_PER_RUN
Problems = Callable[..., list[str]]


@pytest.fixture
def problems(tmp_path: Path) -> Problems:
    """The problems in journals given as "member lease offset" (handled) or "member lease =offset" (stored)."""

    def found(*events: str, letters: tuple[int, ...] = (), faults: bool = True) -> list[str]:
        for at, event in enumerate(events):
            member, lease, offset = event.split()
            handled = f"h 0 {lease} {offset} p {offset}"
            line = f"s 0 {lease} {offset[1:]}" if offset.startswith("=") else handled
            with (tmp_path / member).open("a") as journal:
                journal.write(f"{at} {line}\n")
        buried = [Letter(0, offset, ("p", offset), {}) for offset in letters]
        return Journals(tmp_path.iterdir()).problems(CONTENT, buried, faults=faults)

    return found


def _all(member: str = "a", lease: int = 100, first: int = 0, following: int = 6) -> list[str]:
    return [f"{member} {lease} {offset}" for offset in range(first, following)]


def test_a_quiet_run_and_honest_faults_are_fine(problems: Problems) -> None:
    assert problems(*_all(following=3), *_all("b", 101, 3), "b 101 =6", faults=False) == []


def test_redelivery_of_what_was_not_stored_is_fine(problems: Problems) -> None:
    assert problems(*_all(following=4), "a 100 =2", *_all("b", 101, 2), "a 100 4") == []


def test_a_dead_letter_may_be_left_out(problems: Problems) -> None:
    assert problems(*_all(following=3), *_all("b", 101, 4), letters=(3,)) == []


def test_a_repeat_without_a_fault(problems: Problems) -> None:
    assert "handled twice" in problems(*_all(following=4), *_all("b", 101, 3), faults=False)[0]


def test_a_record_that_nobody_handled(problems: Problems) -> None:
    found = problems(*_all(following=3), *_all("b", 101, 4))
    assert "1 records were never handled" in found[0]
    assert "before 3 was handled" in found[1]


def test_a_record_that_came_too_early(problems: Problems) -> None:
    assert "before 3 was handled" in problems(*_all(following=3), *_all("b", 101, 4), *_all("c", 102, 3))[0]


def test_a_record_that_was_stored_comes_again(problems: Problems) -> None:
    assert "5 was stored" in problems(*_all(), "a 100 =5", *_all("b", 101, 4))[0]


def test_also_in_the_next_run_of_the_broker(problems: Problems) -> None:
    """Leases of a later run may be smaller."""
    assert "5 was stored" in problems(*_all(lease=NEXT_RUN), f"a {NEXT_RUN} =5", *_all("b", 101, 4))[0]


def test_two_that_get_ahead_in_turns(problems: Problems) -> None:
    """What is stored under the older lease is beyond where the newer one began."""
    events = [*_all(following=3), *_all("b", 101, 2, 4), *_all("a", 100, 3), "a 100 =6", "b 101 4"]
    assert "lease 101 gave b 2, 6 was stored under lease 100" in problems(*events)[0]


def test_a_lease_that_skips_or_is_shared(problems: Problems) -> None:
    found = "\n".join(problems(*_all(following=4), "a 100 5", *_all("b", 101, 4), "c 101 4"))
    assert "5 came after 3 to a" in found
    assert "belonged to ['b', 'c']" in found


def test_another_value(problems: Problems, tmp_path: Path) -> None:
    (tmp_path / "z").write_text("99 h 0 103 5 p 4\n")
    assert "the log holds ('p', 5)" in problems(*_all())[0]
