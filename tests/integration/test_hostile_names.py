"""What nodes and clients call themselves, and what records contain, moves no terminal and makes no false line."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator

import pytest

from edgebroker.cli.main import main
from tests.integration.test_registry import RAW, batch, root_of
from tests.kit.brokers import RunningBroker, batch_of
from tests.kit.trees import Tree, reported

pytestmark = pytest.mark.slow

EVIL = "x\x1b[2J\x1b]0;title\x07\nroot  ok\r\x9b31m\u202e"


@pytest.fixture
def root(tree: Tree) -> Iterator[RunningBroker]:
    """With a report, a client and a dead letter of somebody hostile."""
    root = root_of(tree)
    report = {**RAW, "version": EVIL, "labels": {EVIL: EVIL}, "problems": [EVIL], "address": EVIL}
    reported(root, batch({"report": report}))
    client = root.raw(EVIL)
    client.publish("t", batch_of(EVIL.encode(), b"two"))
    client.subscribe("t", "g")
    for _ in range(5):
        head = client.deliver().head
        client.nack(head, head.first, "reason " + EVIL)
        root.advance(5.0)
    for path in ("/v1/tree/nodes", "/v1/groups/g", "/v1/clients"):
        assert EVIL in texts(root.http("GET", path)[1]), path
    yield root


def texts(answer: object) -> list[str]:
    """Every text in an answer."""
    if isinstance(answer, dict):
        return [text for pair in answer.items() for one in pair for text in texts(one)]
    if isinstance(answer, list):
        return [text for one in answer for text in texts(one)]
    return [answer] if isinstance(answer, str) else []


SCREENS = [
    ["status"], ["tree"], ["tree", "--all"], ["tree", "--all", "--json"], ["group", "list"], ["group", "describe", "g"],
    ["group", "describe", "g", "--json"], ["topic", "list"], ["topic", "describe", "t"], ["child", "list"], ["pipe"],
    ["check", "live"], ["check", "fleet"], ["resync", "--status"], ["dlq", "list"], ["dlq", "show", "t"],
    ["dlq", "show", "t", "--json"], ["node", "remove", EVIL], ["wait", "t", "--timeout", "1"],
    ["group", "describe", EVIL],
]  # fmt: skip


@pytest.mark.parametrize("screen", SCREENS, ids=lambda words: " ".join(words)[:30].replace("\x1b", ""))
def test_every_screen(root: RunningBroker, tree: Tree, capsys: pytest.CaptureFixture[str], screen: list[str]) -> None:
    words = [*screen, "--admin", tree.admin("root")]
    if screen[0] == "dlq" and screen[1] == "show":
        words += ["--server", root.server]
    main(words)
    found = capsys.readouterr()
    for text in (found.out, found.err):
        assert "Traceback" not in text
        assert all(line.isprintable() for line in text.split("\n")), text
        assert not any(line.startswith("root  ok") for line in text.split("\n")), text


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_records_on_a_terminal_and_in_a_file(root: RunningBroker, flags: list[str]) -> None:
    program = [sys.executable, "-m", "edgebroker"]
    command = [*program, "consume", "t", "--from", "earliest", "--count", "1", "--server", root.server]
    plain = subprocess.run([*command, *flags], capture_output=True, timeout=60, check=True).stdout
    if flags:
        assert json.loads(plain)["value"] == EVIL
        assert plain.decode().rstrip("\n").isprintable()
    else:
        assert plain == EVIL.encode() + b"\n"
    ours, theirs = pty.openpty()
    with subprocess.Popen([*command, *flags], stdout=theirs, stderr=subprocess.PIPE) as process:
        process.wait(60)
        os.close(theirs)
        with open(ours, "rb", buffering=0) as screen:
            shown = screen.read(1 << 16).decode()
    assert shown.rstrip("\r\n").isprintable()
    assert shown.endswith("\r\n")
