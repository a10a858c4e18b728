"""What systemd and the journal are told, and what a reload changes: real sockets, a real process."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.broker.reload import RELOADABLE
from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.cli.service import journal
from edgebroker.cli.service.journal import BURST, WINDOW_SECONDS, JournalHandler, JsonFormatter, RateLimit, fields_of
from edgebroker.cli.service.supervisor import Systemd
from edgebroker.common.config import describe_keys, load_config
from edgebroker.network.io.loop import Loop
from tests.kit.brokers import running
from tests.kit.clock import ManualClock
from tests.kit.waiting import wait_for


class Receiver:
    """The other end of a notification or journal socket."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.socket.settimeout(10.0)

    def next(self) -> bytes:
        return self.socket.recv(1 << 16)

    def until(self, word: str) -> list[str]:
        """Everything up to the first message with this line."""
        found = [self.next().decode()]
        while word not in found[-1].splitlines():
            found.append(self.next().decode())
        return found


@pytest.fixture
def receiver(tmp_path: Path) -> Iterator[Receiver]:
    found = Receiver(tmp_path / "notify")
    yield found
    found.socket.close()


def test_a_process_tells_its_whole_life(tmp_path: Path, receiver: Receiver) -> None:
    environment = {"NOTIFY_SOCKET": str(receiver.path), "WATCHDOG_USEC": "300000", "WATCHDOG_PID": "1"}
    node = BrokerProcess(tmp_path / "data", environment=environment)
    with node:
        receiver.until("READY=1")
        receiver.until("WATCHDOG=1")
        receiver.until("WATCHDOG=1")
        call(node.admin, "POST", "/v1/topics", {"name": "t", "partitions": 3})
        os.kill(node.pid, signal.SIGHUP)
        assert re.search(r"^MONOTONIC_USEC=\d+$", receiver.until("RELOADING=1")[-1], re.MULTILINE)
        receiver.until("READY=1")
    stopping = receiver.until("STOPPING=1")
    assert "STATUS=stopping" in stopping[-1]
    with node:
        started = receiver.until("READY=1")
        extensions = [text for text in started if "EXTEND_TIMEOUT_USEC=" in text]
        assert len(extensions) == 3  # one for each log


def test_an_abstract_socket_and_none(tmp_path: Path) -> None:
    other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    name = f"edgebroker-test-{os.getpid()}"
    other.bind("\0" + name)
    Systemd({"NOTIFY_SOCKET": "@" + name}).status("one\nline")
    assert other.recv(100) == b"STATUS=one line"
    other.close()
    Systemd({"NOTIFY_SOCKET": "@" + name}).ready()  # nobody there: no error
    silent = Systemd({"WATCHDOG_USEC": "1000"})
    silent.ready()
    assert silent.watchdog_seconds == 0.0


def test_a_loop_that_stands_still_feeds_no_watchdog(receiver: Receiver) -> None:
    clock = ManualClock()
    loop = Loop(clock)
    systemd = Systemd({"NOTIFY_SOCKET": str(receiver.path), "WATCHDOG_USEC": "30000000"})
    systemd.feed_watchdog(loop)
    receiver.socket.setblocking(False)
    assert receiver.next() == b"WATCHDOG=1"
    clock.advance(9.9)
    loop.turn(0.0)
    with pytest.raises(BlockingIOError):
        receiver.next()
    clock.advance(0.2)
    loop.turn(0.0)
    assert receiver.next() == b"WATCHDOG=1"
    loop.close()


# ---- log lines ----


def record(text: str, *args: object, level: int = logging.WARNING, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("edgebroker.test", level, __file__, 1, text, args, None)
    made.__dict__.update(extra)
    return made


@pytest.mark.parametrize(
    ("text", "topic", "partition"),
    [
        ("prices/3: the last 7 bytes are left", "prices", "3"),
        ("topic prices: its creation did not finish", "prices", None),
        ("topic a.b-c is deleted", "a.b-c", None),
        ("meta.db cannot be written", None, None),
        ("/var/lib/x/0: the index", None, None),
        ("no connection to the parent 10.0.0.1:7421: refused", None, None),
    ],
)
def test_a_line_names_its_topic(text: str, topic: str | None, partition: str | None) -> None:
    found = fields_of(record(text), "till")
    assert (found.get("topic"), found.get("partition")) == (topic, partition)
    assert found["node"] == "till"


def test_the_journal_gets_fields(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "JOURNAL", str(receiver.path))
    handler = JournalHandler("till-7")
    handler.emit(record("prices/1: %s", "two\nlines", level=logging.ERROR, problem="damaged"))
    handler.close()
    data = receiver.next()
    length = (len("prices/1: two\nlines")).to_bytes(8, "little")
    assert data.startswith(b"MESSAGE\n" + length + b"prices/1: two\nlines\n")
    rest = dict(line.split(b"=", 1) for line in data.splitlines() if b"=" in line)
    assert rest[b"PRIORITY"] == b"3"
    assert (rest[b"EB_NODE"], rest[b"EB_TOPIC"], rest[b"EB_PARTITION"]) == (b"till-7", b"prices", b"1")
    assert rest[b"EB_PROBLEM"] == b"damaged"


def test_without_a_journal_the_priority_stands_in_front(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(journal, "JOURNAL", str(tmp_path / "nobody"))
    handler = JournalHandler("till")
    handler.emit(record("something"))
    handler.close()
    assert capsys.readouterr().err == "<4>something\n"


def test_json_lines_can_be_read_back() -> None:
    line = json.loads(JsonFormatter("till").format(record('prices/0: "quoted" %d', 5)))
    assert line["message"] == 'prices/0: "quoted" 5'
    assert (line["level"], line["node"], line["topic"]) == ("warning", "till", "prices")


def test_the_journal_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (tmp_path / "stream").open("w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        found = os.fstat(stream.fileno())
        assert journal.stderr_is_the_journal({"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"})
        assert not journal.stderr_is_the_journal({"JOURNAL_STREAM": "8:1"})
    assert not journal.stderr_is_the_journal({})
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert not journal.stderr_is_the_journal({"JOURNAL_STREAM": "8:1"})


def test_many_lines_of_a_kind_are_counted_instead() -> None:
    clock = ManualClock()
    limit = RateLimit(clock)
    passed = [limit.filter(record("line %d", number)) for number in range(100)]
    assert passed == [True] * BURST + [False] * (100 - BURST)
    assert limit.filter(record("another"))
    clock.advance(WINDOW_SECONDS)
    last = record("line %d", 100)
    assert limit.filter(last)
    assert last.getMessage() == "line 100 (80 similar lines suppressed)"


# ---- reload ----


def test_the_keys_that_can_be_reloaded_exist_and_are_documented() -> None:
    keys = {key for key, *_ in describe_keys()}
    assert keys >= RELOADABLE
    text = (Path(__file__).parents[3] / "docs" / "configuration.md").read_text()
    listed = set(re.findall(r"`([a-z]+\.[a-z_]+)`", text.partition("## Changing it while a node runs")[2]))
    assert listed == RELOADABLE


def test_a_reload_changes_what_it_can_and_names_the_rest(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    data = tmp_path / "data"

    def configure(lines: str) -> None:
        listen = '[listen]\ntcp = "127.0.0.1:0"\nhttp = "127.0.0.1:0"\n'
        file.write_text(f'[node]\ndata_dir = "{data}"\nname = "n"\n{listen}{lines}')

    with running(data, {"node.name": "n"}) as broker:
        before = broker.broker.config
        configure("[storage]\nmax_bytes = 1\nsegment_bytes = 1048576\n[limits]\nmax_connections = 1\n")
        new = load_config(file, environment={})
        changes = broker.call(lambda: broker.broker.reload(new))
        assert set(changes.applied) == {"storage.max_bytes", "limits.max_connections"}
        assert "storage.segment_bytes" in changes.waiting
        assert broker.broker.config.storage.max_bytes == 1
        assert broker.broker.config.storage.segment_bytes == before.storage.segment_bytes
        broker.advance(2.0)
        again = broker.call(lambda: broker.broker.reload(new))
        assert not again.applied
        assert "storage.segment_bytes" in again.waiting


def test_a_process_reads_its_file_again_and_refuses_a_wrong_one(tmp_path: Path) -> None:
    file = tmp_path / "node.toml"
    file.write_text("")
    node = BrokerProcess(tmp_path / "data", arguments=["--config", str(file)])
    with node:
        file.write_text('[log]\nlevel = "debug"\n[topics]\npartitions = 4\n')
        os.kill(node.pid, signal.SIGHUP)
        await_log(node, "changed: log.level")
        await_log(node, "restart the node to apply: topics.partitions")
        file.write_text("[log]\nlevle = 1\n")
        os.kill(node.pid, signal.SIGHUP)
        await_log(node, "reload failed, the configuration is unchanged: log.levle")
        assert node.ready()


def await_log(node: BrokerProcess, text: str) -> None:
    wait_for(lambda: text in node.log_path.read_text(), f"the log says {text!r}")
