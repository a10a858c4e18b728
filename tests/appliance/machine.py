"""A machine with a real systemd as its first process: Debian in a container of systemd-nspawn, without a host systemd.

The root file system is made once by debootstrap; each machine writes into a layer of its own, which is kept over
power-offs and power cuts and thrown away at the end. The containers get cgroups of their own below ours. Where the
host has version 1 of the memory controller, limits are shown but not enforced in it: `virtual.py` is for those.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from edgebroker.common.runtime.clock import sleep
from tests.kit.waiting import wait_for

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "edgebroker"
PACKAGES = "systemd,systemd-sysv,dbus,procps,iproute2,ca-certificates"
ENVIRONMENT = ("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "TERM=dumb", "SYSTEMD_COLORS=0")
BOOT_SECONDS, COMMAND_SECONDS = 60.0, 300.0
TOOLS = ("systemd-nspawn", "debootstrap", "nsenter", "mkfs.ext4")


def unavailable() -> str:
    """Why there can be no machine here; "" when there can."""
    if os.geteuid():
        return "needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(missing)} (systemd-container, debootstrap, e2fsprogs)" if missing else ""


def root_of(release: str) -> Path:
    """A minimal root file system of a Debian release, made when it is needed first."""
    path = CACHE / f"rootfs-{release}"
    if not (path / "etc/debian_version").exists() or (path / "debootstrap").exists():
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", release, str(path)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
    return path


class Failed(AssertionError):
    """A command in the machine ended with another exit code than it should."""


class Machine:
    """Boot with boot(); run commands with run(); end with close()."""

    alive: list[Machine] = []

    def __init__(self, name: str, disks: Sequence[tuple[str, int]] = ()) -> None:
        """`disks`: (mount point, MiB) of file systems of its own, ext4 on a loop device."""
        self.name = f"eb-{name}-{os.getpid()}"
        self._place = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self.root = self._place / "root"
        for part in ("upper", "work", "root"):
            (self._place / part).mkdir()
        layers = f"lowerdir={root_of('bookworm')},upperdir={self._place}/upper,workdir={self._place}/work"
        _host("mount", "-t", "overlay", self.name, "-o", layers, str(self.root))
        self._mounts = [self.root]
        self._binds: list[str] = []
        for number, (point, mebibytes) in enumerate(disks):
            self._disk(number, point, mebibytes)
        (self.root / "etc/machine-id").unlink(missing_ok=True)
        (self.root / "etc/machine-id").touch()
        (self.root / "etc/hostname").write_text("terminal-17\n")
        self._mask("console-getty.service", "systemd-networkd-wait-online.service")
        self._cgroups: list[Path] = []
        self._nspawn: subprocess.Popen[bytes] | None = None
        self._leader = 0
        Machine.alive.append(self)

    def _disk(self, number: int, point: str, mebibytes: int) -> None:
        image, mounted = self._place / f"disk{number}", self._place / f"mounted{number}"
        with image.open("wb") as file:
            file.truncate(mebibytes << 20)
        mounted.mkdir()
        _host("mkfs.ext4", "-q", "-m", "0", str(image))
        _host("mount", "-o", "loop", str(image), str(mounted))
        self._mounts.append(mounted)
        (mounted / "lost+found").rmdir()
        (self.root / point.lstrip("/")).mkdir(parents=True, exist_ok=True)
        self._binds.append(f"--bind={mounted}:{point}")

    def _mask(self, *units: str) -> None:
        for unit in units:
            path = self.root / "etc/systemd/system" / unit
            path.unlink(missing_ok=True)
            path.symlink_to("/dev/null")

    # ---- power ----

    def boot(self, *, read_only: bool = False) -> None:
        """Switch on, and wait until systemd has started everything. `read_only`: the root, all but /var."""
        command = [
            "systemd-nspawn", "--register=no", "--keep-unit", "--console=read-only", "--private-network", "--boot",
            "--quiet", f"--machine={self.name}", f"--directory={self.root}", "--kill-signal=SIGRTMIN+3", *self._binds,
        ]  # fmt: skip
        if read_only:
            # By a way of its own: what lies below the root becomes read-only with it.
            var = self._place / "var"
            var.mkdir()
            _host("mount", "--bind", str(self.root / "var"), str(var))
            self._mounts.append(var)
            command += ["--read-only", f"--bind={var}:/var"]
        joins = "".join(f"echo $$ > {path}/cgroup.procs; " for path in self._make_cgroups())
        with (self._place / "console").open("ab") as console:
            self._nspawn = subprocess.Popen(
                ["/bin/sh", "-c", f'{joins}exec "$@"', "sh", *command, "systemd.show_status=0"],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                env={**os.environ, "SYSTEMD_NSPAWN_UNIFIED_HIERARCHY": "1"},
            )
        try:
            wait_for(self._booted, "systemd answers", BOOT_SECONDS)
        except TimeoutError as error:
            raise Failed(f"no boot: {error}\n{self.console()}") from error
        state = self.run("systemctl", "is-system-running", "--wait", codes=(0, 1)).strip()
        assert state in ("running", "degraded"), state

    def _booted(self) -> bool:
        assert self._nspawn is not None
        if self._nspawn.poll() is not None:
            raise Failed(f"the machine went off: {self.console()}")
        children = Path(f"/proc/{self._nspawn.pid}/task/{self._nspawn.pid}/children").read_text().split()
        if not children:
            return False
        self._leader = int(children[0])
        return Path(f"/proc/{self._leader}/root/run/systemd/private").exists()

    def _make_cgroups(self) -> list[Path]:
        """One of our own in each hierarchy that systemd needs; the children of the one that we are in."""
        if not self._cgroups:
            unified = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines() if " cgroup2 " in line]
            for line in Path("/proc/self/cgroup").read_text().splitlines():
                _, controllers, path = line.split(":", 2)
                top = {"": unified[0] if unified else "", "name=systemd": "/sys/fs/cgroup/systemd"}.get(controllers, "")
                if top and Path(top).is_dir():
                    place = Path(top + path) / self.name
                    place.mkdir(exist_ok=True)
                    self._cgroups.append(place)
        return self._cgroups

    def power_off(self) -> None:
        """As an operator does: systemctl poweroff."""
        self.run("systemctl", "poweroff", codes=(0, 1, 137, 255))
        self._wait_off()

    def cut_power(self) -> None:
        """Every process of it is gone in the same moment."""
        os.kill(self._leader, signal.SIGKILL)
        self._wait_off()

    def _wait_off(self) -> None:
        assert self._nspawn is not None
        self._nspawn.wait(60)
        self._nspawn = None

    def close(self) -> None:
        if self._nspawn is not None:
            # The first process of the machine before nspawn: the other way round it would go on running.
            if self._leader and Path(f"/proc/{self._leader}").exists():
                os.kill(self._leader, signal.SIGKILL)
            self._nspawn.kill()
            self._nspawn.wait()
        for mount in reversed(self._mounts):
            subprocess.run(["umount", "-l", str(mount)], check=False)
        for place in self._cgroups:
            wait_for(lambda place=place: _removed(place), f"nobody is left in {place}", 10.0)
        shutil.rmtree(self._place, ignore_errors=True)
        Machine.alive.remove(self)

    def __enter__(self) -> Machine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- inside ----

    def inside(self, *command: str) -> list[str]:
        """The command line on this host that runs a command in the machine."""
        return ["nsenter", "-t", str(self._leader), "-a", "--", "env", "-i", *ENVIRONMENT, *command]

    def beside(self, *command: str) -> list[str]:
        """The command line that runs a command of this host in the machine's network only."""
        return ["nsenter", "-t", str(self._leader), "-n", "--", *command]

    def run(self, *command: str, codes: Sequence[int] = (0,), text: str = "") -> str:
        """What a command prints to stdout and stderr. Raises Failed for an exit code that is none of `codes`."""
        done = subprocess.run(
            self.inside(*command), input=text, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
        )
        said = done.stdout + done.stderr
        if done.returncode not in codes:
            raise Failed(f"{' '.join(command)}: exit code {done.returncode}\n{said[-6000:]}")
        return said

    def copy(self, source: Path, target: str) -> None:
        path = self.root / target.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, path) if source.is_dir() else shutil.copy2(source, path)

    def file(self, path: str) -> Path:
        """A file of the machine, as this host sees it."""
        return Path(f"/proc/{self._leader}/root{path}") if self._nspawn is not None else self.root / path.lstrip("/")

    def shown(self, unit: str, name: str) -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", unit, "-p", name, "--value").strip()

    def wait_active(self, unit: str, seconds: float = 60.0) -> None:
        wait_for(lambda: self.shown(unit, "ActiveState") == "active" or _pause(), f"{unit} is active", seconds)

    def wait_for(self, *command: str, has: str, seconds: float = 60.0, codes: Sequence[int] = (0, 1, 2, 3)) -> str:
        """Run a command again and again until it prints `has`; what it printed then."""
        said = ""

        def look() -> bool:
            nonlocal said
            said = self.run(*command, codes=codes)
            return has in said or _pause()

        try:
            wait_for(look, f"{' '.join(command)} says {has}", seconds)
        except TimeoutError as error:
            raise Failed(f"{error}; it says {said[-3000:]}") from error
        return said

    def console(self) -> str:
        return (self._place / "console").read_text(errors="replace")[-4000:]

    def journal(self, *arguments: str) -> str:
        if self._nspawn is None:
            return self.console()
        return self.run("journalctl", "--no-pager", "-o", "short-precise", *arguments)


def _removed(cgroup: Path) -> bool:
    """Remove a control group with all below it; False while the kernel has not let go of a process."""
    try:
        for path in sorted(cgroup.rglob("*"), key=lambda path: -len(path.parts)):
            if path.is_dir():
                path.rmdir()
        cgroup.rmdir()
    except OSError:
        return _pause()
    return True


def _pause() -> bool:
    """Between two looks: each starts a process."""
    sleep(0.2)
    return False


def _host(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(command)}: {done.stderr}")


def keep_journals(where: Path, test: str) -> str:
    """Write down what every machine said that is still there; where to."""
    where.mkdir(parents=True, exist_ok=True)
    for machine in Machine.alive:
        path = where / f"{test}.{machine.name}.journal"
        try:
            path.write_text(machine.journal())
        except (Failed, OSError, subprocess.SubprocessError) as error:
            path.write_text(f"{error}\n{machine.console()}")
        print(f"journal: {path}", file=sys.stderr)
    return str(where)
