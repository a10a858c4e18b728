"""upgrade: what is checked before anything is touched. The switch itself needs a systemd: tests/appliance."""

from __future__ import annotations

import argparse
import errno
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from edgebroker.cli.appliance import releases
from edgebroker.cli.appliance import upgrade as module
from edgebroker.cli.appliance.host import Machine, point
from edgebroker.cli.appliance.upgrade import judge, prepare
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.version import DATA_FORMAT
from tests.kit.minisign import SigningKey
from tests.kit.programs import frozen, script

__all__ = ["frozen"]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """With a release that runs, and one before it."""
    (tmp_path / "image").mkdir()
    found = Machine(tmp_path / "image", dry=False, quiet=True)
    for version, link in (("0.1.0", releases.PREVIOUS), ("1.0.0", releases.CURRENT)):
        with releases.staged(found, script(tmp_path / version, version)) as program:
            release = releases.keep(found, program, version)
        point(found.path(link), f"releases/{release}")
    return found


def kept(machine: Machine) -> set[str]:
    return {path.name.split("-")[0] for path in machine.path(releases.RELEASES).iterdir()}


def options(program: Path | None, sha256: str | None = None, **changes: object) -> argparse.Namespace:
    """An unsigned release, with its digest."""
    digest = sha256
    if digest is None:
        digest = releases.digest_of(program) if program is not None and program.exists() else ""
    wanted = {"file": str(program or ""), "sha256": digest, "unsigned": True, "signature": "", "downgrade": False}
    return argparse.Namespace(**{"accept_format": False, **wanted, **changes})


def test_a_good_release_is_put_beside_the_running_one(machine: Machine, tmp_path: Path) -> None:
    program = script(tmp_path / "new", "2.0.0")
    release = prepare(machine, options(program))
    assert release.startswith("2.0.0-")
    assert (machine.path(releases.RELEASES) / release / "edgebroker").read_bytes() == program.read_bytes()


@pytest.mark.parametrize("sha256", ["0" * 64, "abc"])
def test_another_digest_is_refused(machine: Machine, tmp_path: Path, sha256: str) -> None:
    with pytest.raises(EdgeBrokerError, match="copy the file again"):
        prepare(machine, options(script(tmp_path / "new"), sha256))


def test_a_digest_or_a_signature_must_be_given(machine: Machine, tmp_path: Path) -> None:
    program = script(tmp_path / "new")
    with pytest.raises(ConfigError, match="--unsigned needs --sha256 HEX"):
        prepare(machine, options(program, ""))
    with pytest.raises(ConfigError, match="this program has no keys of releases"):
        prepare(machine, options(program, unsigned=False))
    with pytest.raises(ConfigError, match=r"upgrade needs FILE, with FILE\.minisig beside it"):
        prepare(machine, options(None))


def test_an_older_release_has_to_be_asked_for(machine: Machine, tmp_path: Path) -> None:
    for version in ("0.9.9", "0.10.0"):
        program = script(tmp_path / version, version)
        with pytest.raises(EdgeBrokerError, match=rf"release {version} is older than 1\.0\.0, which runs"):
            prepare(machine, options(program))
        assert prepare(machine, options(program, downgrade=True)).startswith(version)


def test_a_signed_release(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = SigningKey()
    monkeypatch.setattr(module, "RELEASE_KEYS", (key.public,))
    program = script(tmp_path / "new", "2.0.0")
    key.sign(program, f"edgebroker version=2.0.0 data_format={DATA_FORMAT}")
    signed = options(program, unsigned=False, sha256="")
    assert prepare(machine, signed).startswith("2.0.0-")
    key.sign(program, f"edgebroker version=2.0.1 data_format={DATA_FORMAT}")
    with pytest.raises(EdgeBrokerError, match=r"is signed as release 2\.0\.1, and says that it is 2\.0\.0"):
        prepare(machine, signed)
    elsewhere = (tmp_path / "new.minisig").rename(tmp_path / "other")
    with pytest.raises(EdgeBrokerError, match=r"new\.minisig is missing: download it with the release"):
        prepare(machine, signed)
    key.sign(program, f"edgebroker version=2.0.0 data_format={DATA_FORMAT}", elsewhere)
    program.write_bytes(program.read_bytes() + b"#")
    marker = tmp_path / "ran"
    with pytest.raises(EdgeBrokerError, match="the file was changed, or is another one"):
        prepare(machine, options(program, unsigned=False, sha256="", signature=str(elsewhere)))
    assert not marker.exists()


def test_a_file_that_is_not_there(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        prepare(machine, options(tmp_path / "absent", "0" * 64))


@pytest.mark.parametrize("content", ["#!/bin/sh\necho '{}'\n", "#!/bin/sh\nexit 1\n", "\x7fELF for another machine"])
def test_what_is_no_edgebroker_is_refused(machine: Machine, tmp_path: Path, content: str) -> None:
    program = tmp_path / "other"
    program.write_text(content)
    with pytest.raises(EdgeBrokerError, match="not an edgebroker program that runs on this machine"):
        prepare(machine, options(program))


def test_a_release_that_fails_its_own_checks_is_refused(machine: Machine, tmp_path: Path) -> None:
    with pytest.raises(EdgeBrokerError, match="fails its self-test; nothing was changed"):
        prepare(machine, options(script(tmp_path / "new", selftest=1)))


def test_a_newer_data_format_has_to_be_accepted(machine: Machine, tmp_path: Path) -> None:
    program = script(tmp_path / "new", data_format=DATA_FORMAT + 1)
    with pytest.raises(EdgeBrokerError, match="only restoring a backup could undo it"):
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
    with pytest.raises(ConfigError, match="use the one-file form"):
        prepare(machine, options(program))


def test_what_is_checked_is_what_is_kept(machine: Machine, tmp_path: Path) -> None:
    """Whoever can write to the file that was given changes nothing any more: here it is changed while it is asked."""
    program = script(tmp_path / "new", "2.0.0")
    evil = script(tmp_path / "evil", "6.6.6")
    program.write_text(program.read_text().replace("case $1", f"cp {evil} {program}; case $1"))
    content = program.read_bytes()
    release = prepare(machine, options(program))
    assert program.read_bytes() == evil.read_bytes()
    assert release.startswith("2.0.0-")
    assert (machine.path(releases.RELEASES) / release / "edgebroker").read_bytes() == content


# ---- releases ----


UNIT = "edgebroker.service"


@pytest.fixture
def restarts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The releases that nodes were restarted with; those of version 2 do not come up."""
    found: list[str] = []

    def restart(machine: Machine, switch: releases.ReleaseSwitch, ended: Callable[[], bool]) -> str:
        found.append(releases.current(machine).partition("-")[0])
        return f"{UNIT}: it failed" if found[-1] == "2.0.0" else ""

    monkeypatch.setattr(module, "_restart", restart)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    return found


def switched(machine: Machine, tmp_path: Path, version: str = "2.0.0") -> releases.ReleaseSwitch:
    release = prepare(machine, options(script(tmp_path / f"new{version}", version)))
    return releases.begin(machine, release, [UNIT], 60.0)


def state(machine: Machine) -> tuple[str, str, set[str], bool]:
    names = (releases.current(machine).partition("-")[0], releases.previous(machine).partition("-")[0])
    return *names, kept(machine), releases.pending(machine) is not None


def test_a_good_release_leaves_the_last_two(machine: Machine, tmp_path: Path, restarts: list[str]) -> None:
    switch = switched(machine, tmp_path, "3.0.0")
    assert state(machine) == ("3.0.0", "1.0.0", {"0.1.0", "1.0.0", "3.0.0"}, True), "nothing goes before it is judged"
    assert judge(machine, switch) == 0
    assert state(machine) == ("3.0.0", "1.0.0", {"1.0.0", "3.0.0"}, False)
    assert restarts == ["3.0.0"]


def test_a_release_that_is_no_good_leaves_everything_as_it_was(
    machine: Machine, tmp_path: Path, restarts: list[str]
) -> None:
    before = state(machine)
    with pytest.raises(EdgeBrokerError, match="rolled back: 1"):
        judge(machine, switched(machine, tmp_path))
    assert state(machine) == before
    assert restarts == ["2.0.0", "1.0.0"]


def test_nobody_need_be_there_to_read_what_it_says(
    machine: Machine, tmp_path: Path, restarts: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line dropped: what it prints goes nowhere, and it goes back all the same."""

    def gone(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    before = state(machine)
    switch = switched(machine, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("builtins.print", gone)
        patch.setattr(os, "dup2", lambda *_: None)
        with pytest.raises(EdgeBrokerError, match="rolled back"):
            judge(machine, switch)
    assert state(machine) == before


class PowerCut(BaseException):
    pass


@pytest.mark.parametrize("first", [True, False], ids=["the-first-upgrade", "a-later-one"])
@pytest.mark.parametrize("version", ["2.0.0", "3.0.0"])
def test_wherever_the_power_goes_the_next_boot_ends_it(
    machine: Machine, tmp_path: Path, restarts: list[str], monkeypatch: pytest.MonkeyPatch, version: str, first: bool
) -> None:
    """Before each change of a link or a file in turn, until it comes to its end without one."""
    program = script(tmp_path / "new", version)
    for cut in range(20):
        again = tmp_path / f"again{cut}"
        shutil.copytree(machine.root, again, symlinks=True)
        one = Machine(again, dry=False, quiet=True)
        if first:
            one.path(releases.PREVIOUS).unlink()
        before = state(one)
        release = prepare(one, options(program))
        restarts.clear()
        done = PowerCuts(monkeypatch, cut, partial(upgrade_to, one, release))
        found = releases.pending(one)
        if found is None and done.cut:
            good = {before[0], version} if version == "3.0.0" else {before[0]}
            assert releases.current(one).partition("-")[0] in good
        elif found is not None:
            assert any((one.path(link) / releases.PROGRAM).exists() for link in (releases.PREVIOUS, releases.CURRENT))
            upgrade_on(one, found)
        assert releases.pending(one) is None
        ended = releases.current(one).partition("-")[0]
        assert ended == "1.0.0" if version == "2.0.0" else ended in ("1.0.0", "3.0.0")
        assert releases.previous(one) != releases.current(one)
        if restarts:
            assert restarts[-1] == ended, "what runs is what is said to be current"
        if not done.cut:
            assert cut > 4
            return
    raise AssertionError("no end")


def upgrade_to(machine: Machine, release: str) -> None:
    upgrade_on(machine, releases.begin(machine, release, [UNIT], 60.0))


def upgrade_on(machine: Machine, switch: releases.ReleaseSwitch) -> None:
    try:
        judge(machine, switch)
    except EdgeBrokerError as error:
        assert "rolled back" in str(error)


class PowerCuts:
    """Runs something and ends it before its change number `at`; `cut` when it came to that."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, work: Callable[[], None]) -> None:
        self._left = at
        self.cut = False
        with monkeypatch.context() as patch:
            for name in ("point", "write_durable", "sync_directory", "_remove"):
                patch.setattr(releases, name, self._step(getattr(releases, name)))
            try:
                work()
            except PowerCut:
                self.cut = True

    def _step(self, real: Callable[..., None]) -> Callable[..., None]:
        def step(*arguments: Any, **options: Any) -> None:
            if self._left == 0:
                raise PowerCut
            self._left -= 1
            real(*arguments, **options)

        return step


def test_half_a_release_is_none(machine: Machine, tmp_path: Path) -> None:
    """As the power leaves it when it goes while an old one is removed or a new one is copied."""
    program = script(tmp_path / "new", "2.0.0")
    place = machine.path(f"{releases.RELEASES}/{releases.name_of(program, '2.0.0')}")
    place.mkdir()
    (place / "edgebroker").write_text("")
    release = prepare(machine, options(program))
    assert (machine.path(releases.RELEASES) / release / "edgebroker").read_bytes() == program.read_bytes()


def test_a_full_disk_leaves_no_half_copy(machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    program = options(script(tmp_path / "new", "2.0.0"))
    monkeypatch.setattr(shutil, "copy2", full)
    with pytest.raises(OSError, match="No space"):
        prepare(machine, program)
    assert kept(machine) == {"0.1.0", "1.0.0"}
