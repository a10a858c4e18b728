"""`edgebroker upgrade`: another release of the program, or back to the one before, without anybody standing by.

    verify the digest -> let the new program check itself -> switch by rename -> restart -> wait until ready
    -> not ready in time: switch back, restart, say so, exit 1

The data is not touched: a release that writes a newer format than the running one reads is refused unless that is
accepted, for there would be no way back.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgebroker.cli import releases
from edgebroker.cli.adminclient import call
from edgebroker.cli.machine import Machine
from edgebroker.cli.process import environment_of_others
from edgebroker.common.clock import SystemClock, sleep
from edgebroker.common.config import load_config
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.version import DATA_FORMAT

POLL_SECONDS = 0.25
SELFTEST_SECONDS = 120
STEADY_SECONDS = 4.0


def upgrade(options: argparse.Namespace) -> int:
    machine = Machine(Path("/"), options.dry_run)
    machine.check()
    if releases.packaged():
        raise ConfigError("this program came with a package; upgrade that: dpkg -i edgebroker_VERSION_ARCH.deb")
    running = releases.current(machine)
    if not running:
        raise ConfigError("nothing is installed here yet; run: edgebroker install --role ROLE")
    with _alone(machine.path(releases.HOME) / "lock"):
        if options.undo:
            release = releases.previous(machine)
            if not release:
                raise ConfigError("there is no release before this one to go back to")
        else:
            release = prepare(machine, options)
        if release == running:
            print(f"{release} runs already")
            return 0
        return _switch(machine, running, release, options.timeout)


def prepare(machine: Machine, options: argparse.Namespace) -> str:
    """Check a program and put it among the releases; its name there."""
    if not options.file or not options.sha256:
        raise ConfigError("upgrade FILE --sha256 HEX (or --undo) is expected")
    program = Path(options.file).resolve()
    if not program.is_file():
        raise ConfigError(f"{program}: there is no such file")
    found = releases.digest_of(program)
    if found != options.sha256.lower():
        raise EdgeBrokerError(f"{program} has the SHA-256 {found}, not {options.sha256}; it was not delivered whole")
    os.chmod(program, 0o755)
    said = releases.ask_version(program)
    if said["data_format"] > DATA_FORMAT and not options.accept_format:
        raise EdgeBrokerError(
            f"release {said['version']} writes data format {said['data_format']}, which this one ({DATA_FORMAT}) "
            "cannot read: there is no way back but a restore. Make a backup, then say --accept-format"
        )
    if said["data_format"] < DATA_FORMAT:
        raise EdgeBrokerError(
            f"release {said['version']} reads data format {said['data_format']} only, the data here has {DATA_FORMAT}; "
            "nothing was changed"
        )
    machine.say(f"let release {said['version']} check itself")
    if not machine.dry:
        done = subprocess.run(
            [program, "selftest"], capture_output=True, text=True, timeout=SELFTEST_SECONDS, env=environment_of_others()
        )
        if done.returncode:
            raise EdgeBrokerError(f"the new program fails its own checks; nothing was changed:\n{done.stderr.strip()}")
    return releases.put(machine, program, said["version"])


def _switch(machine: Machine, running: str, release: str, timeout: float) -> int:
    units = _active_units(machine)
    releases.switch(machine, release)
    if machine.dry:
        machine.say(f"restart {', '.join(units) or 'nothing (no node runs)'} and wait until ready")
        return 0
    failed = _restart(machine, units, timeout)
    if not failed:
        print(f"release {release} runs ({', '.join(units) or 'no node was running'}); before: {running}")
        return 0
    print(f"release {release} does not come up: {failed}\nback to {running}")
    releases.switch(machine, running)
    again = _restart(machine, units, timeout)
    if again:
        raise EdgeBrokerError(f"release {running} does not come up either: {again}; see journalctl -u edgebroker")
    raise EdgeBrokerError(f"rolled back: {running} runs again, nothing was lost")


def _active_units(machine: Machine) -> list[str]:
    """The nodes of this machine that run, or are being started again and again."""
    names = ("edgebroker.service", "edgebroker@*.service")
    lines = machine.ask("systemctl", "list-units", "--plain", "--no-legend", "--all", *names).splitlines()
    states = [line.split() for line in lines if len(line.split()) > 3]
    return [unit for unit, _, state, *_ in states if state in ("active", "activating", "reloading")]


def _restart(machine: Machine, units: list[str], timeout: float) -> str:
    """Restart the nodes one after the other, the parent of the machine first; why one did not become ready, or ""."""
    for unit in sorted(units, key=len):
        machine.ask("systemctl", "reset-failed", unit)
        machine.run("systemctl", "restart", "--no-block", unit)
        why = _wait_ready(machine, unit, timeout)
        if why:
            return f"{unit}: {why}"
    return ""


def _wait_ready(machine: Machine, unit: str, timeout: float) -> str:
    """Until systemd has heard READY and the node has answered for STEADY_SECONDS in the same process; else why not.
    A full disk or a missing parent is no fault of a release."""
    instance = unit.removesuffix(".service").partition("@")[2]
    config = load_config(machine.path(f"etc/edgebroker/{instance or 'edgebroker'}.toml"), environment={})
    admin = config.listen.http.replace("0.0.0.0", "127.0.0.1").replace("[::]", "[::1]")
    clock = SystemClock()
    deadline, why = clock.monotonic() + timeout, "it does not answer"
    steady, since = "", 0.0
    while clock.monotonic() < deadline:
        sleep(POLL_SECONDS)
        said = machine.ask("systemctl", "show", unit, "-p", "ActiveState", "-p", "MainPID", "-p", "Result")
        state = dict(line.partition("=")[::2] for line in said.splitlines())
        if state.get("ActiveState") == "failed":
            return f"it failed ({state.get('Result')}); see journalctl -u {unit}"
        try:
            call(admin, "GET", "/healthz")
        except EdgeBrokerError as error:
            why, steady = str(error), ""
            continue
        if state.get("ActiveState") != "active":
            why, steady = f"systemd says {state.get('ActiveState')}", ""
        elif state["MainPID"] != steady:
            why, steady, since = "it does not stay up", state["MainPID"], clock.monotonic()
        elif clock.monotonic() - since >= STEADY_SECONDS:
            return ""
    return f"not ready after {timeout:.0f} s: {why}"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold a lock that ends with this process. Raises EdgeBrokerError when another process has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise EdgeBrokerError("another upgrade is under way") from error
    finally:
        os.close(fd)
