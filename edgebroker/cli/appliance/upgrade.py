"""`edgebroker upgrade`: another release of the program, or back to the one before, without anybody standing by.

    copy it to where only root can change it -> verify the digest -> let it check itself -> switch by rename -> restart
    -> ready and steady: the release is good
    -> not in time: switch back, restart, say so, exit 1

What a power cut interrupts is finished at the next boot by edgebroker-upgrade.service. The data is not touched: a
release that writes a newer format than the running one reads is refused unless that is accepted, for there would be no
way back.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgebroker.cli import environment
from edgebroker.cli.appliance import releases
from edgebroker.cli.appliance.host import Machine, plainly, tell
from edgebroker.cli.appliance.releases import ReleaseSwitch
from edgebroker.common.clock import SystemClock, sleep
from edgebroker.common.errors import ConfigError, EdgeBrokerError

POLL_SECONDS = 0.25
SELFTEST_SECONDS = 120
STEADY_SECONDS = 4.0


def upgrade(options: argparse.Namespace) -> int:
    machine = Machine(Path("/"), options.dry_run)
    machine.check()
    if releases.packaged():
        raise ConfigError("this program came with a package; upgrade that: dpkg -i edgebroker_VERSION_ARCH.deb")
    if not releases.current(machine):
        raise ConfigError("nothing is installed here yet; run: edgebroker install --role ROLE")
    with plainly(), _alone(machine):
        if unfinished := releases.pending(machine):
            tell(f"the switch to {unfinished.after} was interrupted; that is finished first")
            if not machine.dry:
                judge(machine, unfinished)
        if options.resume:
            return 0
        running = releases.current(machine)
        release = _undone(machine, options) if options.undo else prepare(machine, options)
        if release == running:
            tell(f"{release} runs already")
            return 0
        units = _units(machine)
        well = [unit for unit, state in units.items() if state == "active"]
        switch = releases.begin(machine, release, well, options.timeout)
        if machine.dry:
            machine.say(f"restart {', '.join(units) or 'nothing (no node runs)'} and judge it")
            return 0
        return judge(machine, switch)


def prepare(machine: Machine, options: argparse.Namespace) -> str:
    """Check a program and put it among the releases; its name there."""
    if not options.file or not options.sha256:
        raise ConfigError("upgrade FILE --sha256 HEX (or --undo) is expected")
    given = Path(options.file).resolve()
    if not given.is_file():
        raise ConfigError(f"{given}: there is no such file")
    if releases.is_folder(given):
        raise ConfigError(f"{given} is the folder form, which no single digest vouches for; give the one file")
    with releases.staged(machine, given) as program:
        found = releases.digest_of(program)
        if found != options.sha256.lower():
            raise EdgeBrokerError(f"{given} has the SHA-256 {found}, not {options.sha256}; it was not delivered whole")
        version = _check_format(machine, program, options)
        machine.say(f"let release {version} check itself")
        if not machine.dry:
            _selftest(program)
        return releases.keep(machine, program, version)


def _undone(machine: Machine, options: argparse.Namespace) -> str:
    release = releases.previous(machine)
    if not release:
        raise ConfigError("there is no release before this one to go back to")
    _check_format(machine, machine.path(f"{releases.RELEASES}/{release}/{releases.PROGRAM}"), options)
    return release


def _check_format(machine: Machine, program: Path, options: argparse.Namespace) -> str:
    """The format that the running release writes must be read by the new one, and the other way round as long as there
    should be a way back. The version of the new one."""
    said = releases.ask_version(program)
    here = releases.ask_version(machine.path(f"{releases.CURRENT}/{releases.PROGRAM}"))["data_format"]
    if said["data_format"] > here and not options.accept_format:
        raise EdgeBrokerError(
            f"release {said['version']} writes data format {said['data_format']}, which the running one ({here}) "
            "cannot read: there is no way back but a restore. Make a backup, then say --accept-format"
        )
    if said["data_format"] < here:
        raise EdgeBrokerError(
            f"release {said['version']} reads data format {said['data_format']} only, the data here has {here}; "
            "nothing was changed"
        )
    return str(said["version"])


def _selftest(program: Path) -> None:
    done = subprocess.run(
        [program, "selftest"],
        capture_output=True,
        text=True,
        timeout=SELFTEST_SECONDS,
        env=environment.for_other_programs(),
    )
    if done.returncode:
        raise EdgeBrokerError(f"the new program fails its own checks; nothing was changed:\n{done.stderr.strip()}")


# ---- the switch ----


def judge(machine: Machine, switch: ReleaseSwitch) -> int:
    """Restart all nodes with the release that is switched to; back to the one before when that goes wrong somehow, and
    when somebody ends this. Whatever happens meanwhile, one of the two is gone to to the end."""
    ended = _ended_by_signals()
    failed = "the power went before the switch"
    if releases.current(machine) == switch.after:
        try:
            failed = _restart(machine, switch, ended)
        except EdgeBrokerError as error:
            failed = str(error)
    if not failed:
        releases.end(machine, switch)
        tell(f"release {switch.after} runs ({', '.join(switch.well) or 'no node did'}); before: {switch.before}")
        return 0
    tell(f"release {switch.after} does not come up: {failed}\nback to {switch.before}")
    releases.back(machine, switch)
    try:
        failed = _restart(machine, switch, lambda: False)
    finally:
        releases.end(machine, switch)
    if failed:
        raise EdgeBrokerError(f"release {switch.before} does not come up either: {failed}; journalctl -u edgebroker")
    raise EdgeBrokerError(f"rolled back: {switch.before} runs again, nothing was lost")


def _ended_by_signals() -> Callable[[], bool]:
    """From now on signals do not end this process: they are noted. A line that drops means nothing at all."""
    seen: list[int] = []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: seen.append(number))
    return lambda: bool(seen)


def _units(machine: Machine) -> dict[str, str]:
    """State of each node of this machine that runs, tries to, or has failed; the first one first. A node that somebody
    has stopped stays so."""
    names = ("edgebroker.service", "edgebroker@*.service")
    said = machine.ask("systemctl", "list-units", "--plain", "--no-legend", "--all", *names)
    found = {line.split()[0]: line.split()[2] for line in said.splitlines() if len(line.split()) > 3}
    return {unit: found[unit] for unit in sorted(found, key=len) if found[unit] != "inactive"}


def _restart(machine: Machine, switch: ReleaseSwitch, ended: Callable[[], bool]) -> str:
    """Restart the nodes one after the other, the first of the machine first, with the units of their release. Why one
    that was well is not any more; "" when all are. A node that was not well before is no fault of this release."""
    machine.ask(str(machine.path(f"{releases.CURRENT}/{releases.PROGRAM}")), "install", "--refresh")
    for unit in dict.fromkeys([*switch.well, *_units(machine)]):
        machine.ask("systemctl", "reset-failed", unit)
        machine.run("systemctl", "restart", "--no-block", unit)
        why = _wait_ready(machine, unit, switch.timeout, ended)
        if why and (unit in switch.well or ended()):
            return f"{unit}: {why}"
        if why:
            tell(f"{unit} was not well before and is not now: {why}; see journalctl -u {unit}")
    return ""


def _wait_ready(machine: Machine, unit: str, timeout: float, ended: Callable[[], bool]) -> str:
    """Until the node has told systemd that it is ready (recovered, both ports answer), and was the same process of this
    release for STEADY_SECONDS; else why not. A full disk or a missing parent is no fault of a release."""
    release = machine.path(releases.CURRENT).resolve()
    clock = SystemClock()
    deadline, why = clock.monotonic() + timeout, "it is not ready"
    steady, since = "", 0.0
    while clock.monotonic() < deadline:
        if ended():
            return "interrupted"
        sleep(POLL_SECONDS)
        said = machine.ask("systemctl", "show", unit, "-p", "ActiveState", "-p", "MainPID", "-p", "Result")
        state = dict(line.partition("=")[::2] for line in said.splitlines())
        if state.get("ActiveState") == "failed":
            return f"it failed ({state.get('Result')})"
        pid = state.get("MainPID", "0")
        if state.get("ActiveState") != "active" or not _is_of(pid, release):
            why, steady = f"systemd says {state.get('ActiveState')}", ""
        elif pid != steady:
            why, steady, since = "it does not stay up", pid, clock.monotonic()
        elif clock.monotonic() - since >= STEADY_SECONDS:
            return ""
    return f"not ready after {timeout:.0f} s: {why}"


def _is_of(pid: str, release: Path) -> bool:
    try:
        return Path(os.readlink(f"/proc/{pid}/exe")).is_relative_to(release)
    except OSError:
        return False


@contextmanager
def _alone(machine: Machine) -> Iterator[None]:
    """Hold a lock that ends with this process. Raises EdgeBrokerError when another process has it."""
    if machine.dry:
        yield
        return
    fd = os.open(machine.path(releases.HOME) / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise EdgeBrokerError("another upgrade is under way") from error
        yield
    finally:
        os.close(fd)
