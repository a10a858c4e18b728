"""A node that came with the image of the machine, on a disk that has become full while it was down."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from .machine import Machine

UNIT, CACHE = "edgebroker.service", "/var/cache/edgebroker"


@pytest.fixture(scope="module")
def machine(program: Path) -> Iterator[Machine]:
    """Installed while its image was built, on a host that has neither its user nor its systemd."""
    with Machine("small", disks=[(CACHE, 64)]) as found:
        subprocess.run([program, "install", "--root", str(found.root), "--role", "pos", "--id", "store-3"], check=True)
        found.boot()
        yield found


def test_it_comes_up_by_itself(machine: Machine) -> None:
    machine.wait_active(UNIT)
    assert "store-3 (pos)" in machine.run("edgebroker", "status")
    assert machine.run("stat", "-c", "%U:%G %a", "/etc/edgebroker/edgebroker.toml").strip() == "root:edgebroker 640"


def test_it_starts_on_a_disk_that_was_filled_while_it_was_down(machine: Machine) -> None:
    machine.run("systemctl", "stop", UNIT)
    with machine.file(f"{CACHE}/somebody-elses").open("wb", buffering=0) as file:
        for size in (1 << 20, 4096, 1):
            try:
                while True:
                    os.write(file.fileno(), bytes(size))
            except OSError:
                continue
    assert os.statvfs(machine.file(CACHE)).f_bavail == 0
    machine.run("systemctl", "start", UNIT)
    assert machine.shown(UNIT, "ActiveState") == "active"
