"""The Debian package in a booted systemd: installed, configured, upgraded, downgraded, removed. Data stays."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.version import __version__

from . import builds
from .machine import Machine

UNIT, CONFIG, ENVIRONMENT = "edgebroker.service", "/etc/edgebroker/edgebroker.toml", "/etc/default/edgebroker"


def package(folder: Path, out: Path) -> Path:
    """The package made of a folder form."""
    environment = {**os.environ, "FOLDER": str(folder), "OUT": str(out)}
    script = builds.ROOT / "packaging" / "deb.sh"
    subprocess.run([str(script)], env=environment, check=True, capture_output=True)
    [found] = out.glob("*.deb")
    return found


@pytest.fixture(scope="module")
def packages(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """This release and a newer one."""
    newer = builds.newer().parent / "folder"
    return package(folder, tmp_path_factory.mktemp("this")), package(newer, tmp_path_factory.mktemp("newer"))


@pytest.fixture(scope="module")
def machine(program: Path) -> Iterator[Machine]:
    with Machine("package") as found:
        found.boot()
        yield found


def install(machine: Machine, deb: Path) -> str:
    machine.copy(deb, f"/root/{deb.name}")
    return machine.run("dpkg", "-i", f"/root/{deb.name}")


def everything(machine: Machine, group: str, count: int) -> list[str]:
    said = machine.run("edgebroker", "consume", "t", "--group", group, "--count", str(count), "--timeout", "30")
    return said.split()[:count]


def test_the_same_folder_gives_the_same_package(packages: tuple[Path, Path], folder: Path, tmp_path: Path) -> None:
    assert package(folder, tmp_path).read_bytes() == packages[0].read_bytes()


def test_it_is_installed_and_starts_as_a_node_of_its_own(machine: Machine, packages: tuple[Path, Path]) -> None:
    install(machine, packages[0])
    assert machine.shown(UNIT, "ActiveState") == "inactive", "nobody has asked for it yet"
    machine.run("systemctl", "start", "edgebroker")
    assert machine.run("edgebroker", "status").startswith("HEALTHY")
    assert machine.shown(UNIT, "User") == "edgebroker"
    completion = "/usr/share/bash-completion/completions/edgebroker"
    assert "edgebroker" in machine.run("bash", "-c", f". {completion}; complete -p edgebroker")


def test_a_role_is_written_over_the_defaults(machine: Machine) -> None:
    said = machine.run("edgebroker", "install", "--role", "pos", "--id", "store-9", "--start")
    assert "/opt/edgebroker" not in said
    assert "store-9 (pos)" in machine.run("edgebroker", "status")
    machine.run("edgebroker", "install", "--role", "local", "--start")
    for unit in (UNIT, "edgebroker@local.service"):
        assert machine.shown(unit, "ActiveState") == "active"
        assert machine.run("systemctl", "is-enabled", unit).strip() == "enabled"
    machine.run("edgebroker", "publish", "t", text="a\nb\nc\n")


def test_upgrade_and_downgrade_keep_data_and_local_changes(machine: Machine, packages: tuple[Path, Path]) -> None:
    config, environment = machine.file(CONFIG), machine.file(ENVIRONMENT)
    config.write_text(config.read_text() + "# ours\n")
    environment.write_text(environment.read_text() + "EDGEBROKER_LOG_LEVEL=debug\n")
    kept = config.read_text(), environment.read_text()
    for number, (deb, version) in enumerate(((packages[1], builds.NEWER), (packages[0], __version__))):
        before = machine.shown(UNIT, "MainPID")
        install(machine, deb)
        machine.wait_active(UNIT)
        assert machine.shown(UNIT, "MainPID") != before
        assert f"edgebroker {version}" in machine.run("edgebroker", "status")
        assert (config.read_text(), environment.read_text()) == kept
        assert everything(machine, f"g{number}", 3) == ["a", "b", "c"]


def test_its_own_upgrade_command_points_to_the_package(machine: Machine) -> None:
    said = machine.run("edgebroker", "upgrade", "/root/x", "--sha256", "0", codes=(2,))
    assert "dpkg -i" in said


def test_removing_it_keeps_the_data(machine: Machine) -> None:
    machine.run("dpkg", "--remove", "edgebroker")
    assert machine.file(CONFIG).exists()
    assert not machine.file("/usr/lib/edgebroker").exists()
    machine.run("dpkg", "--purge", "edgebroker")
    assert not machine.file(CONFIG).exists()
    assert machine.file("/var/lib/edgebroker/topics/t").is_dir()
