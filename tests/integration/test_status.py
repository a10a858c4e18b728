"""status, check and support-bundle against a running broker; completion; the page of `bench all`."""

from __future__ import annotations

import json
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgebroker.cli.appliance.bundle import redacted
from edgebroker.cli.bench import target as targetbench
from edgebroker.cli.bench.target import BenchmarkResult, page, verdict
from edgebroker.cli.main import main
from tests.kit.brokers import RunningBroker, numbered, running

CLOSED = "127.0.0.1:9"  # nobody listens on discard


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as found:
        client = found.raw("labels")
        client.publish("prices", numbered(0, 10))
        client.subscribe("prices", "labels")
        client.deliver()
        yield found


def admin(broker: RunningBroker) -> str:
    host, port = broker.broker.listeners.http_address
    return f"{host}:{port}"


def said(capsys: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    capsys.readouterr()
    assert main(arguments) == code
    return capsys.readouterr().out


# ---- status ----


def test_one_screen(broker: RunningBroker, capsys: pytest.CaptureFixture[str]) -> None:
    screen = said(capsys, 0, "status", "--admin", admin(broker))
    assert screen.startswith("HEALTHY: ")
    assert "parent    none (this is the root)" in screen
    assert "a sync takes" in screen
    rows = [line.split() for line in screen.splitlines()]
    assert ["prices", "stream", "1", "10"] in [row[:4] for row in rows]
    assert ["labels", "1", "10"] in [row[:3] for row in rows]


def test_what_is_wrong_stands_first_with_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path / "full", {"storage.hard_free_bytes": 1 << 50, "storage.soft_free_bytes": 1 << 50}) as broker:
        broker.advance(5.0)
        lines = said(capsys, 1, "status", "--admin", admin(broker)).splitlines()
        assert lines[0].startswith("NOT READY: ")
        at = next(number for number, line in enumerate(lines) if line.startswith("  disk_full: "))
        assert lines[at + 1].startswith("    do: ")
        assert "READY CRITICAL: " in said(capsys, 2, "check", "ready", "--admin", admin(broker))
        found = json.loads(said(capsys, 1, "status", "--json", "--admin", admin(broker)))
        assert found["verdict"]["status"] == "not ready"
        assert {"node", "pipe", "topics", "groups"} < found.keys()


def test_dead_letters_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with running(tmp_path / "data", {"delivery.max_attempts": 1}) as broker:
        client = broker.raw("labels")
        client.publish("prices", numbered(0, 1))
        with broker.consumer(["prices"], "labels", auto_ack=False) as consumer:
            consumer.nack(consumer.poll(10.0)[0], "not for us")
            while broker.counters()["dead_letters"] < 1:
                consumer.poll(0.05)
        assert "1 dead letter pending" in said(capsys, 0, "status", "--admin", admin(broker))


def test_nobody_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--admin", CLOSED]) == 3
    assert "is it running" in capsys.readouterr().err


# ---- check ----


@pytest.mark.parametrize("what", ["live", "ready", "lag"])
def test_well(broker: RunningBroker, capsys: pytest.CaptureFixture[str], what: str) -> None:
    line = said(capsys, 0, "check", what, "--admin", admin(broker))
    assert line.startswith(f"EDGEBROKER {what.upper()} OK: ")
    assert len(line.splitlines()) == 1


@pytest.mark.parametrize("what", ["live", "ready", "lag"])
def test_silence_is_critical(capsys: pytest.CaptureFixture[str], what: str) -> None:
    assert "CRITICAL: no broker answers" in said(capsys, 2, "check", what, "--admin", CLOSED)


def test_a_missing_parent_is_a_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """And a container goes on: its engine knows only good and bad."""
    with running(tmp_path / "data", {"node.level": "pos", "pipe.parents": CLOSED}) as broker:
        broker.advance(5.0)
        assert "READY WARNING: parent: " in said(capsys, 1, "check", "ready", "--admin", admin(broker))
        assert "READY WARNING" in said(capsys, 0, "check", "ready", "--healthcheck", "--admin", admin(broker))
        assert said(capsys, 0, "status", "--admin", admin(broker)).startswith("DEGRADED: ")


def test_an_engine_knows_only_one_failure(capsys: pytest.CaptureFixture[str]) -> None:
    said(capsys, 1, "check", "ready", "--healthcheck", "--admin", CLOSED)


def test_lag_in_records(broker: RunningBroker, capsys: pytest.CaptureFixture[str]) -> None:
    def lag(code: int, warning: int, critical: int) -> str:
        limits = ("--warning", str(warning), "--critical", str(critical))
        return said(capsys, code, "check", "lag", "--records", *limits, "--admin", admin(broker))

    assert lag(0, 11, 20) == "EDGEBROKER LAG OK: 1 group less than 11 records behind | 'labels'=10;11;20\n"
    assert "WARNING: group labels is 10 records behind" in lag(1, 10, 20)
    assert "CRITICAL: group labels is 10 records behind" in lag(2, 5, 10)


def test_a_group_that_is_not_there_is_unknown(broker: RunningBroker, capsys: pytest.CaptureFixture[str]) -> None:
    assert "UNKNOWN: group g does not exist" in said(
        capsys, 3, "check", "lag", "--group", "g", "--admin", admin(broker)
    )


@pytest.mark.parametrize("wrong", [("raedy",), ("lag", "--warning", "abc"), ()])
def test_a_call_that_is_wrong_is_unknown(wrong: tuple[str, ...]) -> None:
    """2 would be taken for CRITICAL."""
    assert main(["check", *wrong]) == 3


# ---- support-bundle ----


def test_the_bundle_has_what_is_needed_and_no_secrets(
    broker: RunningBroker, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "node.toml"
    config.write_text(f'[node]\ndata_dir = "{tmp_path / "data"}"\n# api_token = "hunter2"\n')
    path = tmp_path / "bundle.tar.gz"
    arguments = ("support-bundle", str(path), "--config", str(config), "--admin", admin(broker))
    assert said(capsys, 0, *arguments).strip() == str(path)
    assert path.stat().st_mode & 0o777 == 0o600
    with tarfile.open(path) as bundle:
        found = {Path(entry.name).name: (bundle.extractfile(entry) or path.open("rb")).read() for entry in bundle}
    assert json.loads(found["http-v1-node.json"])["status"] == 200
    assert b"hunter2" not in b"".join(found.values())
    assert b"api_token = ***" in found["config-node.toml"]
    assert b"topics/prices/0/" in found["files-node.txt"]
    assert not any(b"value 3" in content for content in found.values()), "no records"
    assert main(arguments) == 2, "an existing file is left as it is"


def test_of_a_node_that_is_down_there_is_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bundle.tar.gz"
    said(capsys, 0, "support-bundle", str(path), "--admin", CLOSED)
    with tarfile.open(path) as bundle:
        missing = bundle.extractfile("edgebroker-bundle/missing.txt")
        assert missing is not None
        assert b"/v1/node: no broker answers" in missing.read()


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ('password = "x y"', "password = ***"),
        ("EB_TOKEN: abc", "EB_TOKEN: ***"),
        ('{"password": "hunter2", "port": 1}', '{"password": ***, "port": 1}'),
        ("tool --password hunter2 --port 1", "tool --password *** --port 1"),
        ("tool --api-key=hunter2 more", "tool --api-key=***"),
        ("Authorization: Bearer hunter2", "Authorization: Bearer ***"),
        ("http://me:pass@host:1/", "http://me:***@host:1/"),
        ("tokens are counted", "tokens are counted"),
        ('data_dir = "/var"', 'data_dir = "/var"'),
    ],
)
def test_redaction(text: str, clean: str) -> None:
    assert redacted(text) == clean


# ---- completion ----


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_every_verb(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    script = said(capsys, 0, "completion", shell)
    assert "support-bundle" in script
    if shell == "bash":
        asked = (
            f"{script}\nCOMP_WORDS=(edgebroker ch); COMP_CWORD=1; $(complete -p edgebroker | grep -o '_shtab[^ ]*')\n"
        )
        done = subprocess.run(
            ["bash", "-c", asked + 'echo "${COMPREPLY[@]}"'], capture_output=True, text=True, check=True
        )
        assert done.stdout.split() == ["check", "child"]


# ---- bench all ----


def results(sync_ms: float, p99_ms: float = 0.0) -> list[BenchmarkResult]:
    values = {
        "disk: append 4 KiB and sync, p50": sync_ms,
        "disk: append 4 KiB and sync, p99": p99_ms or 2 * sync_ms,
        "publish in batches, durable": 90_432.0,
        "push to a consumer, p50": 1.5 * sync_ms,
        "push to a consumer, p99": 3 * sync_ms,
        "start after SIGKILL until ready": 400.0,
    }
    found = [BenchmarkResult(name, value, "ms", "", None) for name, value in values.items()]
    return [
        *found,
        BenchmarkResult("publish one at a time, durable, p50", 1.01 * sync_ms, "ms", "append and sync", 1.01),
    ]


@pytest.mark.parametrize(
    ("sync", "words", "advice"),
    [
        (0.4, "syncs in 0.4 ms (fast): expect 2,500 durable", False),
        (18.0, "syncs in 18.0 ms (slow): expect 55 durable single publishes a second from one client, 90,000", True),
    ],
)
def test_the_verdict_is_in_plain_words(sync: float, words: str, advice: bool) -> None:
    said = verdict(results(sync))
    assert words in said[0]
    assert any("commit_interval_ms" in line for line in said) is advice
    assert not any("worn" in line for line in said)
    assert any("worn" in line for line in verdict(results(sync, 11 * sync)))


def test_the_page_has_a_line_for_each_result() -> None:
    report = {
        "version": "1", "machine": "till", "cores": 2, "memory_bytes": 2 << 30, "kernel": "6.1", "load": 0.1,
        "directory": "/var",
    }  # fmt: skip
    lines = page(report, results(18.0)).splitlines()
    assert lines[0] == "edgebroker 1 on till: 2 cores, 2.0 GiB, kernel 6.1, load 0.1"
    assert any(line.startswith("publish one at a time, durable") and "1.01 x append and sync" in line for line in lines)


def test_a_disk_without_room_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targetbench, "NEEDED_BYTES", 1 << 60)
    assert main(["bench", "all", str(tmp_path)]) == 2
    assert "the benchmark needs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
