"""upgrade: what is checked before anything is touched. The switch itself needs a systemd: tests/appliance."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from programs import frozen, script

from edgebroker.cli import releases
from edgebroker.cli.machine import Machine, point
from edgebroker.cli.upgrade import prepare
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.version import DATA_FORMAT

__all__ = ["frozen"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """With a release that runs, and one before it."""
    (tmp_path / "image").mkdir()
    found = Machine(tmp_path / "image", dry=False, quiet=True)
    for version, link in (("0.1.0", releases.PREVIOUS), ("1.0.0", releases.CURRENT)):
        release = releases.keep(found, releases.stage(found, script(tmp_path / version, version)), version)
        point(found.path(link), f"releases/{release}")
    return found


def kept(machine: Machine) -> set[str]:
    return {path.name.split("-")[0] for path in machine.path(releases.RELEASES).iterdir()}


def options(program: Path | None, sha256: str = "", *, accept_format: bool = False) -> argparse.Namespace:
    digest = sha256 or (releases.digest_of(program) if program is not None and program.exists() else "")
    return argparse.Namespace(file=str(program or ""), sha256=digest, accept_format=accept_format)


def test_a_good_release_is_put_beside_the_running_one(machine: Machine, tmp_path: Path) -> None:
    program = script(tmp_path / "new", "2.0.0")
    release = prepare(machine, options(program))
    assert release.startswith("2.0.0-")
    assert (machine.path(releases.RELEASES) / release / "edgebroker").read_bytes() == program.read_bytes()


@pytest.mark.parametrize("sha256", ["0" * 64, "abc"])
def test_another_digest_is_refused(machine: Machine, tmp_path: Path, sha256: str) -> None:
    with pytest.raises(EdgeBrokerError, match="not delivered whole"):
        prepare(machine, options(script(tmp_path / "new"), sha256))


def test_a_digest_must_be_given(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--sha256"):
        prepare(machine, argparse.Namespace(file=str(script(tmp_path / "new")), sha256="", accept_format=False))


def test_a_file_that_is_not_there(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        prepare(machine, options(tmp_path / "absent", "0" * 64))


@pytest.mark.parametrize("content", ["#!/bin/sh\necho '{}'\n", "#!/bin/sh\nexit 1\n", "\x7fELF for another machine"])
def test_what_is_no_edgebroker_is_refused(machine: Machine, tmp_path: Path, content: str) -> None:
    program = tmp_path / "other"
    program.write_text(content)
    with pytest.raises(EdgeBrokerError, match="no edgebroker that runs on this machine"):
        prepare(machine, options(program))


def test_a_release_that_fails_its_own_checks_is_refused(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(EdgeBrokerError, match="fails its own checks; nothing was changed"):
        prepare(machine, options(script(tmp_path / "new", selftest=1)))


def test_a_newer_data_format_has_to_be_accepted(machine: Machine, tmp_path: Path) -> None:
    program = script(tmp_path / "new", data_format=DATA_FORMAT + 1)
    with pytest.raises(EdgeBrokerError, match="no way back but a restore"):
        prepare(machine, options(program))
    assert prepare(machine, options(program, accept_format=True))


def test_an_older_data_format_is_refused(machine: Machine, tmp_path: Path) -> None:
    program = script(tmp_path / "new", data_format=DATA_FORMAT - 1)
    for accept in (False, True):
        with pytest.raises(EdgeBrokerError, match="nothing was changed"):
            prepare(machine, options(program, accept_format=accept))


def test_nothing_refused_leaves_anything_behind(machine: Machine, tmp_path: Path) -> None:
    for options_ in (options(script(tmp_path / "new", selftest=1)), options(script(tmp_path / "new"), "0" * 64)):
        with pytest.raises(EdgeBrokerError):
            prepare(machine, options_)
        assert kept(machine) == {"0.1.0", "1.0.0"}


def test_the_folder_form_is_refused(machine: Machine, tmp_path: Path) -> None:
    program = script(tmp_path / "folder" / "edgebroker", "2.0.0")
    (program.parent / "_internal").mkdir()
    with pytest.raises(ConfigError, match="give the one file"):
        prepare(machine, options(program))


def test_what_is_checked_is_what_is_kept(machine: Machine, tmp_path: Path) -> None:
    """Whoever can write to the file given changes nothing any more once its digest was taken."""
    program = script(tmp_path / "new", "2.0.0")
    given = options(program)
    staged = releases.stage(machine, program)
    script(tmp_path / "new", "6.6.6")
    assert releases.digest_of(staged) == given.sha256


# ---- releases ----


def switched(machine: Machine, tmp_path: Path) -> releases.Switch:
    release = prepare(machine, options(script(tmp_path / "new", "2.0.0")))
    return releases.begin(machine, release, ["edgebroker.service"])


def test_a_good_release_leaves_the_last_two(machine: Machine, tmp_path: Path) -> None:
    switch = switched(machine, tmp_path)
    assert kept(machine) == {"0.1.0", "1.0.0", "2.0.0"}, "nothing goes before it is judged"
    assert releases.pending(machine) == switch
    releases.finish(machine)
    assert releases.pending(machine) is None
    assert kept(machine) == {"1.0.0", "2.0.0"}
    assert (releases.current(machine), releases.previous(machine)) == (switch.after, switch.before)


def test_a_release_that_was_no_good_leaves_everything_as_it_was(machine: Machine, tmp_path: Path) -> None:
    before = releases.current(machine), releases.previous(machine)
    releases.undo(machine, switched(machine, tmp_path))
    assert (releases.current(machine), releases.previous(machine)) == before
    assert kept(machine) == {"0.1.0", "1.0.0"}
    assert releases.pending(machine) is None


@pytest.mark.parametrize("steps", range(4))
def test_wherever_the_power_goes_it_is_known_where_to_go_back_to(
    machine: Machine, tmp_path: Path, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = releases.current(machine), releases.previous(machine)
    done = 0

    def cut(real: Callable[..., None]) -> Callable[..., None]:
        def step(*arguments: Any, **options: Any) -> None:
            nonlocal done
            if done == steps:
                raise KeyboardInterrupt
            done += 1
            real(*arguments, **options)

        return step

    with monkeypatch.context() as patch:
        patch.setattr(releases, "point", cut(releases.point))
        patch.setattr(releases, "write_durable", cut(releases.write_durable))
        try:
            switched(machine, tmp_path)
        except KeyboardInterrupt:
            pass
    assert done == min(steps, 3)
    found = releases.pending(machine)
    assert (found is None) == (steps == 0)
    if found is not None:
        releases.undo(machine, found)
    assert (releases.current(machine), releases.previous(machine)) == before


def test_half_a_release_is_none(machine: Machine, tmp_path: Path) -> None:
    """As the power leaves it when it goes while an old one is removed or a new one is copied."""
    program = script(tmp_path / "new", "2.0.0")
    place = machine.path(f"{releases.RELEASES}/{releases.name_of(program, '2.0.0')}")
    place.mkdir()
    (place / "edgebroker").write_text("")
    release = prepare(machine, options(program))
    assert (machine.path(releases.RELEASES) / release / "edgebroker").read_bytes() == program.read_bytes()
