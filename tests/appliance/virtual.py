"""A virtual machine without acceleration: Debian's own kernel, and the minimal Debian as its initial RAM disk.

Unlike a container it has a memory controller of its own, so that the limits of a unit are enforced.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from .machine import CACHE, root_of

TOOLS = ("qemu-system-x86_64", "cpio", "apt-get", "dpkg-deb")
SECONDS = 400
# Not needed there, and every byte is unpacked by an emulated processor.
BALLAST = ("usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/info", "usr/share/perl", "usr/share/i18n",
           "usr/share/zoneinfo", "var/cache/apt", "var/lib/apt/lists", "usr/lib/x86_64-linux-gnu/gconv")  # fmt: skip
MASKED = ("getty.target", "systemd-update-utmp.service", "apt-daily.timer", "systemd-udevd.service",
          "systemd-logind.service", "systemd-udev-trigger.service", "e2scrub_reap.service",
          "serial-getty@ttyS0.service", "systemd-random-seed.service")  # fmt: skip
BEGIN, END = "EB-BEGIN", "EB-END"


def unavailable() -> str:
    if os.geteuid():
        return "needs root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"needs {', '.join(missing)} (qemu-system-x86, cpio)" if missing else ""


def kernel() -> Path:
    """Debian's kernel for virtual machines, fetched when it is needed first."""
    path = CACHE / "vmlinuz"
    if not path.exists():
        said = subprocess.run(
            ["apt-cache", "depends", "linux-image-cloud-amd64"], check=True, capture_output=True, text=True
        ).stdout
        [package] = [line.split()[1] for line in said.splitlines() if "Depends: linux-image" in line]
        with tempfile.TemporaryDirectory() as place:
            subprocess.run(["apt-get", "download", package], cwd=place, check=True, capture_output=True)
            [deb] = Path(place).glob("*.deb")
            subprocess.run(["dpkg-deb", "-x", str(deb), f"{place}/x"], check=True)
            [found] = Path(place, "x/boot").glob("vmlinuz-*")
            shutil.copy2(found, path)
    return path


def run(files: dict[str, Path], script: str) -> str:
    """Boot a machine that has these files, run a shell script in it as its only task; what that printed."""
    with tempfile.TemporaryDirectory(prefix="eb-virtual-") as name:
        place = Path(name)
        for part in ("upper", "work", "root"):
            (place / part).mkdir()
        root = place / "root"
        layers = f"lowerdir={root_of('bookworm')},upperdir={place}/upper,workdir={place}/work"
        subprocess.run(["mount", "-t", "overlay", "eb-virtual", "-o", layers, str(root)], check=True)
        try:
            _prepare(root, files, script)
            disk = place / "initrd.gz"
            pack = f"cd {root} && find . -xdev | cpio -o -H newc --quiet | gzip -1 > {disk}"
            subprocess.run(["sh", "-c", pack], check=True)
        finally:
            subprocess.run(["umount", "-l", str(root)], check=True)
        said = subprocess.run(
            [
                "qemu-system-x86_64", "-machine", "q35,accel=tcg", "-cpu", "max", "-m", "1536", "-smp", "1",
                "-nographic", "-no-reboot", "-nodefaults", "-serial", "stdio",
                "-kernel", str(kernel()), "-initrd", str(disk),
                "-append", "console=ttyS0 rdinit=/init quiet systemd.show_status=0 panic=-1 mitigations=off",
            ],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            check=False,
        ).stdout  # fmt: skip
    assert BEGIN in said and END in said, said[-4000:]
    return said.partition(BEGIN)[2].partition(END)[0].replace("\r", "")


def _prepare(root: Path, files: dict[str, Path], script: str) -> None:
    for path in BALLAST:
        shutil.rmtree(root / path, ignore_errors=True)
    for target, source in files.items():
        path = root / target.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, path) if source.is_dir() else shutil.copy2(source, path)
    (root / "init").symlink_to("/lib/systemd/systemd")
    units = root / "etc/systemd/system"
    for unit in MASKED:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    task = root / "usr/local/bin/task"
    task.write_text(
        f"#!/bin/bash\nexec >/dev/ttyS0 2>&1\necho {BEGIN}\n{script}\necho {END}\nsystemctl poweroff --force\n"
    )
    task.chmod(0o755)
    (units / "task.service").write_text(
        "[Unit]\nAfter=basic.target\n[Service]\nType=oneshot\nExecStart=/usr/local/bin/task\n"
        "Environment=SYSTEMD_PAGER= SYSTEMD_COLORS=0\n"
    )
    (units / "multi-user.target.wants").mkdir(exist_ok=True)
    (units / "multi-user.target.wants/task.service").symlink_to("../task.service")
