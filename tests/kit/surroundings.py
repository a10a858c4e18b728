"""What may surround a node on the machines of thousands of shops: none of it keeps it from starting, serving and
stopping."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edgebroker.client.producer import Producer
from tests.kit.waiting import wait_for

SECONDS = 20.0


def shell(line: str) -> list[str]:
    """A command that runs the rest of its arguments, as "$@", within a line of shell."""
    return ["/bin/sh", "-c", line, "sh"]


def nothing(directory: Path) -> None: ...


@dataclass(frozen=True)
class Surroundings:
    """`environment` comes on top of a plain one (None: not set). `before` is the command that starts the program;
    `said` what the log says about it. `prepare` gets the directory of the test, in which `data` is the node's."""

    name: str
    environment: Mapping[str, str | None] = field(default_factory=dict)
    before: Sequence[str] = ()
    config: bytes = b""
    data: str = "data"
    said: str = ""
    prepare: Callable[[Path], None] = nothing


def long_path(directory: Path) -> None:
    (directory / ("long" * 40)).mkdir()


def socket_is_a_directory(directory: Path) -> None:
    (directory / "data" / "ctl.sock").mkdir(parents=True)


def socket_is_left(directory: Path) -> None:
    (directory / "data").mkdir()
    (directory / "data" / "ctl.sock").write_text("left behind by a crash")


def linked(directory: Path) -> None:
    (directory / "elsewhere").mkdir()
    (directory / "data").symlink_to("elsewhere")


NO_SOCKET = "listen.socket: the socket"
KUBERNETES = {
    "EDGEBROKER_REGISTRY_SERVICE_HOST": "10.0.0.7",
    "EDGEBROKER_REGISTRY_SERVICE_PORT": "7421",
    "EDGEBROKER_REGISTRY_SERVICE_PORT_HTTP": "7421",
    "EDGEBROKER_REGISTRY_PORT": "tcp://10.0.0.7:7421",
    "EDGEBROKER_REGISTRY_PORT_7421_TCP": "tcp://10.0.0.7:7421",
    "EDGEBROKER_REGISTRY_PORT_7421_TCP_PROTO": "tcp",
    "EDGEBROKER_REGISTRY_PORT_7421_TCP_ADDR": "10.0.0.7",
    "EDGEBROKER_PORT": "tcp://10.0.0.7:7420",
    "EDGEBROKER_LOG_NAME": "/edgebroker-log",
}

SURROUNDINGS = [
    Surroundings("kubernetes", KUBERNETES),
    Surroundings(
        "a variable of a later release",
        {"EDGEBROKER_STORAGE_SEGMENT_BYTE": "1"},
        said="EDGEBROKER_STORAGE_SEGMENT_BYTE is ignored: [storage] has no key segment_byte",
    ),
    Surroundings("empty variables",
                 {"EDGEBROKER_LOG_LEVEL": "", "EDGEBROKER_TOPICS_PARTITIONS": "", "NOTIFY_SOCKET": ""}),
    Surroundings("no environment", before=["/usr/bin/env", "-i"]),
    Surroundings("no home, no path", {"HOME": None, "PATH": None, "USER": None, "TMPDIR": "/nowhere"}),
    Surroundings("a bare locale", {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
                 config='[node]\nname = "Käse-7"\n'.encode()),
    Surroundings("a locale that does not exist", {"LC_ALL": "xx_YY.UTF-8", "LANG": "??"}),
    Surroundings("an encoding of another age", {"PYTHONIOENCODING": "ascii"},
                 config='[node]\nname = "Käse-7"\n'.encode()),
    Surroundings("a time zone that does not exist", {"TZ": "Mars/Olympus"}),
    Surroundings("proxies", {"HTTP_PROXY": "http://127.0.0.1:1", "http_proxy": "http://127.0.0.1:1", "ALL_PROXY": "x"}),
    Surroundings("no terminal", {"TERM": "dumb", "COLUMNS": "0", "LINES": "-1"}),
    Surroundings("warnings as errors", {"PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"}),
    Surroundings("a supervisor that is gone",
                 {"NOTIFY_SOCKET": "/nowhere/n", "WATCHDOG_USEC": "soon", "JOURNAL_STREAM": "8:x", "LISTEN_FDS": "3"}),
    Surroundings("an abstract socket of a supervisor", {"NOTIFY_SOCKET": "@gone", "WATCHDOG_USEC": "30000000"}),
    Surroundings("standard streams that are closed", before=shell('exec "$@" <&- >&- 2>&-')),
    Surroundings("a full device as log", before=shell('exec "$@" > /dev/full 2>&1')),
    Surroundings("signals that are blocked or ignored", before=shell("trap '' HUP USR1 USR2 PIPE; exec \"$@\"")),
    Surroundings("few descriptors", before=shell('ulimit -n 64; exec "$@"')),
    Surroundings("small stacks, no core files", before=shell('ulimit -s 512; ulimit -c 0; exec "$@"')),
    Surroundings("a mask that hides from others", before=shell('umask 077; exec "$@"')),
    Surroundings("a low priority", before=["/usr/bin/nice", "-n", "19"]),
    Surroundings("a directory that was removed", before=shell('d=$(mktemp -d); cd "$d"; rmdir "$d"; exec "$@"')),
    Surroundings("a byte order mark", config=b"\xef\xbb\xbf[node]\r\nname = \"pos-7\"\r\n"),
    Surroundings("an empty configuration", config=b"\n"),
    Surroundings("a path that is too long for a socket", data="long" * 40 + "/data", said=NO_SOCKET, prepare=long_path),
    Surroundings("a directory where the socket belongs", said=NO_SOCKET, prepare=socket_is_a_directory),
    Surroundings("a file where the socket belongs", prepare=socket_is_left),
    Surroundings("a path with blanks and umlauts", data="Käse und\tWurst; $(rm -rf) 'x'"),
    Surroundings("a directory behind a link", prepare=linked),
]  # fmt: skip


def check(program: Sequence[str], surroundings: Surroundings, directory: Path) -> None:
    """Start the program there, publish a record, ask for its health, stop it."""
    surroundings.prepare(directory)
    ports, log = directory / "ports", directory / "log"
    arguments = ["serve", "--data-dir", str(directory / surroundings.data), "--listen", "127.0.0.1:0"]
    arguments += ["--http", "127.0.0.1:0", "--ports-file", str(ports)]
    if surroundings.config:
        (directory / "edgebroker.toml").write_bytes(surroundings.config)
        arguments += ["--config", str(directory / "edgebroker.toml")]
    plain = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
    environment = {name: value for name, value in {**plain, **surroundings.environment}.items() if value is not None}
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*surroundings.before, *program, *arguments],
            env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        wait_for(lambda: process.poll() is not None or (ports.exists() and ports.read_text()), "it starts")
        assert process.poll() is None, log.read_text()
        found = json.loads(ports.read_text())
        with Producer(found["tcp"], timeout=SECONDS) as producer:
            assert producer.send("t", b"v").result(SECONDS) == 0
        asked = http.client.HTTPConnection(found["http"], timeout=SECONDS)
        asked.request("GET", "/readyz")
        assert asked.getresponse().status == 200
        asked.close()
        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):
            process.send_signal(number)
        code = process.wait(SECONDS)
        assert code == 0, f"{code}: {log.read_text()}"
    finally:
        process.kill()
        process.wait()
    said = log.read_text(errors="backslashreplace")
    assert surroundings.said in said
    assert "Traceback" not in said
