"""upgrade: what is checked before anything is touched. The switch itself needs a systemd: tests/appliance."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from programs import frozen, script

from edgebroker.cli import releases
from edgebroker.cli.machine import Machine
from edgebroker.cli.upgrade import prepare
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.version import DATA_FORMAT

__all__ = ["frozen"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    (tmp_path / "image").mkdir()
    return Machine(tmp_path / "image", dry=False, quiet=True)


def options(program: Path | None, sha256: str = "", *, accept_format: bool = False) -> argparse.Namespace:
    digest = sha256 or (releases.digest_of(program) if program is not None and program.exists() else "")
    return argparse.Namespace(file=str(program or ""), sha256=digest, accept_format=accept_format)


def test_a_good_release_is_put_beside_the_running_one(machine: Machine, tmp_path: Path) -> None:
    program = script(tmp_path / "new", "2.0.0")
    release = prepare(machine, options(program))
    assert release.startswith("2.0.0-")
    assert (machine.path("opt/edgebroker/releases") / release / "edgebroker").read_bytes() == program.read_bytes()


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
    with pytest.raises(EdgeBrokerError):
        prepare(machine, options(script(tmp_path / "new", selftest=1)))
    assert list(machine.root.iterdir()) == []
