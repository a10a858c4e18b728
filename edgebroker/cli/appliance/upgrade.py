"""`edgebroker upgrade`: switch to another release of the program, or back to the one before, unattended.

    copy it to where only root can change it -> verify its signature -> run its self-test -> switch by rename -> restart
    -> ready and stable: the release stays
    -> not in time: switch back, restart, report it, exit 1

After a power cut edgebroker-upgrade.service finishes the upgrade at the next boot. The data is not touched: a release
that writes a newer format than the running one can read is refused unless that is accepted, because it could not be
rolled back.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgebroker.cli import environment
from edgebroker.cli.appliance import releases
from edgebroker.cli.appliance.host import Machine, readable_errors, tell
from edgebroker.cli.appliance.releases import ReleaseSwitch
from edgebroker.cli.appliance.signature import check_signature
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.common.runtime.clock import SystemClock, sleep
from edgebroker.version import RELEASE_KEYS

POLL_SECONDS = 0.25
SELFTEST_SECONDS = 120
STEADY_SECONDS = 4.0


def upgrade(options: argparse.Namespace) -> int:
    machine = Machine(Path("/"), options.dry_run)
    machine.check()
    if releases.packaged():
        raise ConfigError("this program is part of a package; upgrade the package: dpkg -i edgebroker_VERSION_ARCH.deb")
    if not releases.current(machine):
        raise ConfigError("edgebroker is not installed on this machine; run: edgebroker install --role ROLE")
    with readable_errors(), _exclusive(machine):
        if unfinished := releases.pending(machine):
            tell(f"the upgrade to {unfinished.after} was interrupted; finishing it first")
            if not machine.dry:
                judge(machine, unfinished)
        if options.resume:
            return 0
        running = releases.current(machine)
        release = _prepare_undo(machine, options) if options.undo else prepare(machine, options)
        if release == running:
            tell(f"release {release} is already installed")
            return 0
        units = _units(machine)
        well = [unit for unit, state in units.items() if state == "active"]
        switch = releases.begin(machine, release, well, options.timeout)
        if machine.dry:
            machine.say(f"restart {', '.join(units) or 'no node (none runs)'}, and roll back unless all become ready")
            return 0
        return judge(machine, switch)


def prepare(machine: Machine, options: argparse.Namespace) -> str:
    """Check a program and add it to the releases; its name there."""
    if not options.file:
        raise ConfigError("upgrade needs FILE, with FILE.minisig beside it, or --undo")
    if options.unsigned and not options.sha256:
        raise ConfigError("--unsigned needs --sha256 HEX, the digest of the file as published")
    if not options.unsigned and not RELEASE_KEYS:
        raise ConfigError("this program has no keys of releases: give --sha256 HEX --unsigned")
    given = Path(options.file).resolve()
    if not given.is_file():
        raise ConfigError(f"{given}: no such file")
    if releases.is_folder(given):
        raise ConfigError(f"{given} belongs to the folder form, which has no single digest; use the one-file form")
    with releases.staged(machine, given) as program:
        found = releases.digest_of(program)
        if options.sha256 and found != options.sha256.lower():
            raise EdgeBrokerError(f"{given} has the SHA-256 digest {found}, not {options.sha256}; copy the file again")
        signed = None
        if options.unsigned:
            tell(f"warning: nothing but its digest says where {given} is from (--unsigned)")
        else:
            signature = Path(options.signature or f"{given}.minisig")
            signed = check_signature(program, signature, RELEASE_KEYS)
        version = _check_format(machine, program, options)
        if signed is not None and signed.version != version:
            raise EdgeBrokerError(f"{given} is signed as release {signed.version}, and says that it is {version}")
        _check_age(machine, version, options)
        machine.say(f"run the self-test of release {version}")
        if not machine.dry:
            _selftest(program)
        return releases.keep(machine, program, version)


def _prepare_undo(machine: Machine, options: argparse.Namespace) -> str:
    release = releases.previous(machine)
    if not release:
        raise ConfigError("there is no previous release to go back to")
    _check_format(machine, machine.path(f"{releases.RELEASES}/{release}/{releases.PROGRAM}"), options)
    return release


def _check_format(machine: Machine, program: Path, options: argparse.Namespace) -> str:
    """The version of the new release. Raises EdgeBrokerError unless each release reads the data of the other.

    --accept-format accepts data that the running release cannot read, and gives up the rollback.
    """
    new = releases.ask_version(program)
    here = releases.ask_version(machine.path(f"{releases.CURRENT}/{releases.PROGRAM}"))["data_format"]
    if new["data_format"] > here and not options.accept_format:
        raise EdgeBrokerError(
            f"release {new['version']} writes data format {new['data_format']}, which the running release "
            f"(format {here}) cannot read; only restoring a backup could undo it. Make a backup, then add "
            "--accept-format"
        )
    if new["data_format"] < here:
        raise EdgeBrokerError(
            f"release {new['version']} reads data format {new['data_format']}, but the data has format {here}; "
            "nothing was changed"
        )
    return str(new["version"])


def _check_age(machine: Machine, version: str, options: argparse.Namespace) -> None:
    """An older release may have faults that are known: it has to be asked for."""
    here = str(releases.ask_version(machine.path(f"{releases.CURRENT}/{releases.PROGRAM}"))["version"])
    if _numbers(version) < _numbers(here) and not options.downgrade:
        raise EdgeBrokerError(f"release {version} is older than {here}, which runs; if you mean it, add --downgrade")


def _numbers(version: str) -> list[int]:
    """0.10.2 is after 0.9."""
    return [int(part) for part in re.findall(r"\d+", version.partition("+")[0])]


def _selftest(program: Path) -> None:
    done = subprocess.run(
        [program, "selftest"],
        capture_output=True,
        text=True,
        timeout=SELFTEST_SECONDS,
        env=environment.for_other_programs(),
    )
    if done.returncode:
        raise EdgeBrokerError(f"the new release fails its self-test; nothing was changed:\n{done.stderr.strip()}")


# ---- the switch ----


def judge(machine: Machine, switch: ReleaseSwitch) -> int:
    """Restart all nodes with the new release. Roll back when one does not become ready, or on a signal.

    Either the upgrade or the rollback is completed, whatever happens meanwhile.
    """
    ended = _note_signals()
    failed = "a power cut came before the switch"
    if releases.current(machine) == switch.after:
        try:
            failed = _restart(machine, switch, ended)
        except EdgeBrokerError as error:
            failed = str(error)
    if not failed:
        releases.end(machine, switch)
        tell(f"release {switch.after} is running ({', '.join(switch.well) or 'no node was'}); before: {switch.before}")
        return 0
    tell(f"release {switch.after} failed: {failed}\nrolling back to {switch.before}")
    releases.back(machine, switch)
    try:
        failed = _restart(machine, switch, lambda: False)
    finally:
        releases.end(machine, switch)
    if failed:
        raise EdgeBrokerError(
            f"rolled back to {switch.before}, which fails, too: {failed}; see journalctl -u edgebroker"
        )
    raise EdgeBrokerError(f"rolled back: {switch.before} is running again, and nothing was lost")


def _note_signals() -> Callable[[], bool]:
    """From now on signals do not end this process; the answer says if one came. A lost terminal is ignored."""
    seen: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: seen.append(number))
    return lambda: bool(seen)


def _units(machine: Machine) -> dict[str, str]:
    """The state of each node that runs, starts or has failed, edgebroker.service first. Stopped nodes stay stopped."""
    names = ("edgebroker.service", "edgebroker@*.service")
    output = machine.ask("systemctl", "list-units", "--plain", "--no-legend", "--all", *names)
    found = {line.split()[0]: line.split()[2] for line in output.splitlines() if len(line.split()) > 3}
    return {unit: found[unit] for unit in sorted(found, key=len) if found[unit] != "inactive"}


def _restart(machine: Machine, switch: ReleaseSwitch, ended: Callable[[], bool]) -> str:
    """Restart the nodes one by one, with the units of their release. Why one that ran before fails now; "" when none.

    A node that had failed before does not count against the release.
    """
    machine.ask(str(machine.path(f"{releases.CURRENT}/{releases.PROGRAM}")), "install", "--refresh")
    for unit in dict.fromkeys([*switch.well, *_units(machine)]):
        machine.ask("systemctl", "reset-failed", unit)
        machine.run("systemctl", "restart", "--no-block", unit)
        why = _wait_ready(machine, unit, switch.timeout, ended)
        if why and (unit in switch.well or ended()):
            return f"{unit}: {why}"
        if why:
            tell(f"{unit} had failed before, and still does: {why}; see journalctl -u {unit}")
    return ""


def _wait_ready(machine: Machine, unit: str, timeout: float, ended: Callable[[], bool]) -> str:
    """Wait until a node has told systemd that it is ready, and has run for STEADY_SECONDS since; else why not.

    Ready means recovered and listening: a full disk or a missing parent does not count against a release.
    """
    release = machine.path(releases.CURRENT).resolve()
    clock = SystemClock()
    deadline, why = clock.monotonic() + timeout, "it has not started"
    steady, since = "", 0.0
    while clock.monotonic() < deadline:
        if ended():
            return "interrupted"
        sleep(POLL_SECONDS)
        output = machine.ask("systemctl", "show", unit, "-p", "ActiveState", "-p", "MainPID", "-p", "Result")
        state = dict(line.partition("=")[::2] for line in output.splitlines())
        if state.get("ActiveState") == "failed":
            return f"failed ({state.get('Result')})"
        pid = state.get("MainPID", "0")
        if state.get("ActiveState") != "active" or not _is_of(pid, release):
            why, steady = f"its state is {state.get('ActiveState')}", ""
        elif pid != steady:
            why, steady, since = "it keeps restarting", pid, clock.monotonic()
        elif clock.monotonic() - since >= STEADY_SECONDS:
            return ""
    return f"not ready after {timeout:.0f} s: {why}"


def _is_of(pid: str, release: Path) -> bool:
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).is_relative_to(release)
    except OSError:
        return False


@contextmanager
def _exclusive(machine: Machine) -> Iterator[None]:
    """Hold a lock, which also ends with the process. Raises EdgeBrokerError when another process has it."""
    if machine.dry:
        yield
        return
    fd = os.open(machine.path(releases.HOME) / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EdgeBrokerError("another upgrade is running; wait until it has finished") from error
        yield
    finally:
        os.close(fd)
