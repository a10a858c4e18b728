"""The container image, built for real and started without an engine: buildah, isolated by chroot.

The base image is made of a minimal Debian, since there is nothing to pull from. What chroot cannot show is that the
program is process 1; the folder form has one process, that much is looked at.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.cli.admin_client import ask
from edgebroker.common.errors import UnreachableError
from edgebroker.version import __version__
from tests.kit.waiting import wait_for

from .builds import ROOT
from .machine import root_of

# A build behind a company's own certificates and mirrors needs them inside as well.
PASSED = ("/etc/ssl/certs", "/etc/pip.conf")


class Buildah:
    """Images and containers in a place of their own."""

    def __init__(self, place: Path) -> None:
        self._options = ["--root", str(place / "root"), "--runroot", str(place / "run"), "--storage-driver", "vfs"]
        self._environment = {**os.environ, "BUILDAH_ISOLATION": "chroot"}

    def command(self, *arguments: str) -> list[str]:
        return ["buildah", *self._options, *arguments]

    def run(self, *arguments: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            self.command(*arguments), env=self._environment, capture_output=True, text=True, cwd=cwd, check=False
        )
        assert done.returncode == 0, f"{' '.join(arguments)}: {done.stderr[-4000:]}"
        return done.stdout.strip()

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.command(*arguments), env=self._environment, start_new_session=True)


@pytest.fixture(scope="module")
def buildah(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Buildah]:
    if os.geteuid() or shutil.which("buildah") is None:
        pytest.skip("needs root and buildah")
    place = tmp_path_factory.mktemp("buildah")
    found = Buildah(place)
    yield found
    found.run("rm", "--all")
    found.run("rmi", "--all", "--force")


@pytest.fixture(scope="module")
def image(buildah: Buildah) -> str:
    base = buildah.run("from", "scratch")
    buildah.run("add", "--quiet", base, f"{root_of('bookworm')}/", "/")
    buildah.run("commit", "--quiet", base, "localhost/debian")
    volumes = [f"--volume={path}:{path}:ro" for path in PASSED if Path(path).exists()]
    buildah.run(
        "bud", "--format", "docker", "--pull-never", "--quiet", "--build-arg", "BASE=localhost/debian", *volumes,
        "-t", "edgebroker", "-f", "packaging/Dockerfile", ".", cwd=ROOT,
    )  # fmt: skip
    return "edgebroker"


def test_what_an_engine_is_told(buildah: Buildah, image: str) -> None:
    config = json.loads(buildah.run("inspect", "--type", "image", image))["Docker"]["config"]
    assert config["User"] == "10001:10001"
    assert config["StopSignal"] == "SIGTERM"
    assert config["Volumes"] == {"/var/lib/edgebroker": {}}
    assert config["Entrypoint"] == ["/opt/edgebroker/edgebroker"]
    assert config["Cmd"] == ["serve"]
    assert config["Healthcheck"]["Test"] == ["CMD", "/opt/edgebroker/edgebroker", "check", "live", "--healthcheck"]
    assert set(config["ExposedPorts"]) == {"7420/tcp", "7421/tcp"}


def test_it_starts_is_healthy_and_stops(buildah: Buildah, image: str, tmp_path: Path) -> None:
    """As its engine would, but on loopback: with a volume, and a health check from inside."""
    tcp, http = free_address(), free_address()
    container = buildah.run("from", "--pull-never", image)
    data = tmp_path / "volume"
    data.mkdir()
    os.chown(data, 10001, 10001)
    settings = [f"--env=EDGEBROKER_LISTEN_TCP={tcp}", f"--env=EDGEBROKER_LISTEN_HTTP={http}"]
    volume = f"--volume={data}:/var/lib/edgebroker"
    program = "/opt/edgebroker/edgebroker"
    started = buildah.start("run", *settings, volume, container, "--", program, "serve")
    try:
        wait_for(lambda: ready(http), "the node in the container answers", 60.0)
        version = ask(http, "/v1/node")[1]["version"]
        assert version == __version__
        said = buildah.run("run", container, "--", program, "check", "live", "--healthcheck", "--admin", http)
        assert said.startswith("EDGEBROKER LIVE OK")
        [pid] = [process for process in running(program) if owner(process) == 10001]
        os.kill(pid, signal.SIGTERM)
        assert started.wait(30) == 0
        assert (data / "CLEAN").exists()
    finally:
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)


def free_address() -> str:
    """On loopback, where the container is as well: chroot has no network of its own."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return f"127.0.0.1:{server.getsockname()[1]}"


def ready(admin: str) -> bool:
    try:
        return ask(admin, "/readyz")[0] == 200
    except UnreachableError:
        return False


def running(program: str) -> list[int]:
    """Processes of a program, as their first argument says."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if path.read_bytes().split(b"\0")[:2] == [program.encode(), b"serve"]:
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def owner(pid: int) -> int:
    return Path(f"/proc/{pid}").stat().st_uid
