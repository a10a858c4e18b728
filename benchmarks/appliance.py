"""The frozen program: how large it is, how soon ready, how much memory it takes, beside the source and the peers that
are installed here; and how late pushes are while Prometheus asks."""

from __future__ import annotations

import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil

from benchmarks.node import DIRECTORY, running
from benchmarks.rows import DURABLE, RUNS, Row, scaled
from edgebroker.cli.admin_client import call
from edgebroker.cli.bench import native_client
from edgebroker.cli.bench.disk import percentile

ROOT = Path(__file__).parent.parent
ONE_FILE, FOLDER, NUITKA = (ROOT / "dist" / name for name in ("edgebroker", "folder", "nuitka/edgebroker"))
FORMS: dict[str, list[str]] = {
    "source": [sys.executable, "-m", "edgebroker"],
    "folder form": [str(FOLDER / "edgebroker")],
    "one file": [str(ONE_FILE)],
}
STARTS, SETTLE_SECONDS = 9, 2.0
PEER_PORT = 17_399
TOPICS = 64
SCRAPER = (
    "import http.client, sys, time\n"
    "while True:\n"
    "    c = http.client.HTTPConnection(sys.argv[1]); c.request('GET', '/metrics'); c.getresponse().read(); c.close()\n"
    "    time.sleep(1.0)\n"
)


def frozen(pinned: bool) -> list[Row]:
    """`make freeze` comes first."""
    if not ONE_FILE.exists():
        raise SystemExit("make freeze comes first")
    size, whole = ONE_FILE.stat().st_size, sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    rows = [
        Row("size, one file", f"{size / 1e6:.1f} MB", f"folder form {whole / 1e6:.1f} MB", size / 1e6, "15 MB",
            size <= 15e6)
    ]  # fmt: skip
    warm = {form: start_time(command, cold=False) for form, command in FORMS.items()}
    cold = {form: start_time(command, cold=True) for form, command in FORMS.items()}
    for taken, kind, form, most in (
        (warm, "warm", "folder form", 1.5),
        (cold, "cold", "one file", 1.4),
        (warm, "warm", "one file", None),
        (cold, "cold", "folder form", None),
    ):
        ratio = taken[form] / taken["source"]
        rows.append(
            Row(f"{form}, {kind}: until ready", f"{taken[form] * 1e3:.0f} ms", f"source {taken['source'] * 1e3:.0f} ms",
                ratio, f"{most}" if most else "reported", most is None or ratio <= most)
        )  # fmt: skip
    for form, most in (("folder form", 32), ("one file", 36), ("source", None)):
        resident, anonymous = memory_of(FORMS[form])
        rows.append(
            Row(f"{form}: memory, idle", f"{resident:.1f} MiB resident, {anonymous:.1f} anonymous", "", resident,
                f"{most} MiB" if most else "reported", most is None or resident <= most)
        )  # fmt: skip
    if NUITKA.exists():
        taken, (resident, anonymous) = start_time([str(NUITKA)], cold=False), memory_of([str(NUITKA)])
        figure = f"{NUITKA.stat().st_size / 1e6:.1f} MB, {resident:.1f} MiB resident, {anonymous:.1f} anonymous"
        rows.append(
            Row(f"beside: one file by Nuitka, ready in {taken * 1e3:.0f} ms", figure, "", 1.0, "reported", True)
        )
    return rows + peer_rows()


@contextmanager
def started(command: Sequence[str]) -> Iterator[tuple[psutil.Process, float]]:
    """A broker of a form, empty; and the seconds from its start until it is ready."""
    place = Path(tempfile.mkdtemp(prefix="edgebroker-bench-", dir=DIRECTORY))
    ports = place / "ports"
    arguments = ["serve", "--data-dir", str(place / "node"), "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]
    begun = time.perf_counter()
    process = subprocess.Popen(
        [*command, *arguments, "--ports-file", str(ports)],
        stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": DIRECTORY},
    )
    try:
        while not ports.exists():
            if process.poll() is not None:
                raise SystemExit(f"{command[0]} ended with {process.returncode}")
            time.sleep(0.001)
        yield psutil.Process(process.pid), time.perf_counter() - begun
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(place)


def start_time(command: Sequence[str], *, cold: bool) -> float:
    """Median of the seconds until ready; `cold`: nothing of it in the page cache (root)."""
    taken = []
    for _ in range(STARTS):
        if cold:
            os.sync()
            Path("/proc/sys/vm/drop_caches").write_text("3\n")
        with started(command) as (_, seconds):
            taken.append(seconds)
    return statistics.median(taken)


def memory_of(command: Sequence[str]) -> tuple[float, float]:
    """(resident, anonymous) MiB of all its processes, median."""
    found = []
    for _ in range(RUNS):
        with started(command) as (process, _):
            time.sleep(SETTLE_SECONDS)
            found.append(_memory([process, *process.children()]))
    return statistics.median(one for one, _ in found), statistics.median(two for _, two in found)


def _memory(processes: Sequence[psutil.Process]) -> tuple[float, float]:
    resident = anonymous = 0
    for process in processes:
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS"):
                resident += int(line.split()[1])
            if line.startswith("RssAnon"):
                anonymous += int(line.split()[1])
    return resident / 1024, anonymous / 1024


# ---- peers, where they are installed ----


def peer_rows() -> list[Row]:
    rows = []
    for name, arguments in (
        ("redis-server", ["--port", str(PEER_PORT), "--appendonly", "yes", "--appendfsync", "always", "--dir", "{}"]),
        ("nats-server", ["-a", "127.0.0.1", "-p", str(PEER_PORT), "-js", "-sd", "{}"]),
        ("mosquitto", ["-p", str(PEER_PORT)]),
    ):
        path = shutil.which(name)
        if path is not None:
            size, seconds, resident = _peer(path, arguments)
            figure = f"{size / 1e6:.1f} MB, ready in {seconds * 1e3:.0f} ms, {resident:.1f} MiB"
            rows.append(Row(f"beside: {name}", figure, "", 1.0, "reported", True))
    return rows


def _peer(path: str, arguments: Sequence[str]) -> tuple[int, float, float]:
    """(bytes of its program, seconds until its port answers, MiB resident when idle)."""
    taken, resident = [], 0.0
    for _ in range(RUNS):
        place = tempfile.mkdtemp(prefix="edgebroker-bench-", dir=DIRECTORY)
        begun = time.perf_counter()
        process = subprocess.Popen(
            [path, *(word.format(place) for word in arguments)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            while True:
                try:
                    socket.create_connection(("127.0.0.1", PEER_PORT), 1.0).close()
                    break
                except OSError:
                    if process.poll() is not None:
                        raise SystemExit(f"{path} ended with {process.returncode}") from None
                    time.sleep(0.001)
            taken.append(time.perf_counter() - begun)
            time.sleep(SETTLE_SECONDS)
            resident, _ = _memory([psutil.Process(process.pid)])
        finally:
            process.terminate()
            process.wait()
            shutil.rmtree(place)
    return Path(path).stat().st_size, statistics.median(taken), resident


# ---- while it is scraped ----


def scraped(pinned: bool) -> list[Row]:
    """Pushes at 1,000/s with 64 topics and their groups on the page, asked every second; and without."""
    quiet, asked = [], []
    count = scaled(10_000)
    with running(pinned=pinned) as node:
        for number in range(TOPICS):
            topic, group = f"t{number}", f"g{number}"
            native_client.one_by_one(node.host, node.port, topic.encode(), 20, 128, DURABLE, b"fill")
            native_client.consume(node.host, node.port, topic.encode(), group.encode(), 20, 0, b"read")

        def once(name: str) -> float:
            topic = name.encode()
            native_client.one_by_one(node.host, node.port, topic, 1, 128, DURABLE, b"make" + topic)
            found = native_client.push(node.host, node.port, topic, topic, count, 128, 1000.0, DURABLE, topic)
            return percentile(found, 0.99)

        for run in range(RUNS):
            quiet.append(once(f"quiet{run}"))
            asked.append(_while_asked(node.process.admin, lambda run=run: once(f"asked{run}")))
        scrapes = call(node.process.admin, "GET", "/v1/node")["counters"]["http_requests"]
    ratio = statistics.median(a / q for a, q in zip(asked, quiet, strict=True))
    return [
        Row("push p99 at 1,000/s while scraped every second", f"{statistics.median(asked) * 1e6:.0f} us",
            f"not scraped {statistics.median(quiet) * 1e6:.0f} us; {scrapes} requests", ratio, "2.0", ratio <= 2.0)
    ]  # fmt: skip


def _while_asked(admin: str, work: Callable[[], float]) -> float:
    scraper = subprocess.Popen([sys.executable, "-c", SCRAPER, admin])
    try:
        return work()
    finally:
        scraper.terminate()
        scraper.wait()
