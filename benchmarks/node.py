"""A broker process for a benchmark, on a disk of one's choice, pinned or not."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from edgebroker.cli.broker_process import BrokerProcess

DIRECTORY = os.environ.get("EB_BENCH_DIR", "/var/tmp")


class Node:
    """A running broker and where it is."""

    def __init__(self, process: BrokerProcess) -> None:
        self.process = process
        host, _, port = process.server.rpartition(":")
        self.host, self.port = host.encode(), int(port)

    @property
    def server(self) -> str:
        return self.process.server

    def memory(self) -> tuple[float, float]:
        """(resident, anonymous) MiB."""
        fields = {}
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            fields[name] = value.strip()
        return int(fields["VmRSS"].split()[0]) / 1024, int(fields["RssAnon"].split()[0]) / 1024


@contextmanager
def running(*, pinned: bool = False, settings: dict[str, str] | None = None, descriptors: int = 0) -> Iterator[Node]:
    """A fresh broker; `pinned`: the broker on core 0, this process on core 1. `descriptors`: its limit."""
    directory = Path(tempfile.mkdtemp(prefix="edgebroker-bench-", dir=DIRECTORY))
    free = {"EDGEBROKER_STORAGE_HARD_FREE_BYTES": "0", "EDGEBROKER_STORAGE_SOFT_FREE_BYTES": "0"}
    process = BrokerProcess(
        directory / "node",
        settings={**free, **(settings or {})},
        command=[
            *(["prlimit", f"--nofile={descriptors}"] if descriptors else []),
            *(["taskset", "-c", "0"] if pinned else []),
        ],
    )
    before = os.sched_getaffinity(0)
    try:
        if pinned:
            os.sched_setaffinity(0, {1})
        process.start()
        yield Node(process)
        process.stop()
    finally:
        os.sched_setaffinity(0, before)
        process.kill()
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def connected_child(address: str, uid: str) -> Iterator[None]:
    """A node that is connected as a child, without logs: what it reports is taken."""
    host, _, port = address.rpartition(":")
    poll = {"version": 1, "uid": uid, "name": "bench", "level": "local", "topics": [], "logs": []}
    connection = http.client.HTTPConnection(host, int(port))
    connection.request("POST", "/v1/pipe", json.dumps(poll), {"content-type": "application/json"})
    with connection.getresponse() as answer:
        assert answer.status == 200, answer.read()
        yield
    connection.close()
