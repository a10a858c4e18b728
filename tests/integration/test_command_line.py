"""The command line, whatever it is given: a sentence and an exit code, never a traceback."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.brokers import RunningBroker, running, take

pytestmark = pytest.mark.slow

LARGE = b"x" * (2 << 20)


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningBroker]:
    with running(tmp_path_factory.mktemp("broker") / "data") as found:
        found.create("t")
        found.create("full")
        with found.producer() as producer:
            producer.send_many("full", [b"value"] * 5000)
        yield found


def run(
    broker: RunningBroker, line: str, given: bytes = b"", *, redirect: str = "", directory: Path | None = None
) -> tuple[int, str, str]:
    """A line of shell with `edgebroker` for the program; (exit code, stdout, stderr)."""
    program = f"{sys.executable} -m edgebroker"
    tcp, http = broker.server, "{}:{}".format(*broker.broker.listeners.http_address)
    ended = subprocess.run(
        ["/bin/bash", "-c", f"{line.replace('edgebroker', program, 1)} {redirect}"],
        input=given, capture_output=True, timeout=30.0, check=False, cwd=directory,
        env={**os.environ, "EDGEBROKER_SERVER": tcp, "EDGEBROKER_ADMIN": http},
    )  # fmt: skip
    out, errors = (text.decode(errors="backslashreplace") for text in (ended.stdout, ended.stderr))
    for text in (out, errors):
        assert "Traceback" not in text
        assert "defect" not in text
        assert not re.search(r"\w+Error\b|<locals>|object at 0x", text)
    return ended.returncode, out, errors


@pytest.mark.parametrize(
    ("line", "given", "code", "said"),
    [
        ("edgebroker publish t", b"a\n" + LARGE + b"\nb\n", 1, "line 2: a record of .* is too large"),
        ("edgebroker publish t --json", LARGE, 1, "line 1: .*--skip-bad goes on behind it"),
        ("edgebroker publish t --partition 7", b"x", 2, "topic t has no partition 7; it has 1, numbered from 0"),
        ("edgebroker publish t --partition -5", b"x", 2, "--partition"),
        ("edgebroker publish t --partition 99999999", b"x", 2, "topic t has no partition 99999999"),
        ("edgebroker publish t --partition 99999999999999999999", b"x", 2, "--partition is a whole number from -1 to"),
        ("edgebroker publish t --client-id $(printf '%0400d' 1)", b"x", 2, "client_id is up to 200 bytes"),
        ("edgebroker publish t --key $'\\xff'", b"x", 2, "is not UTF-8"),
        ("edgebroker publish $'t\\xff'", b"x", 2, "is not UTF-8"),
        ("edgebroker publish ü", b"x", 2, "topic names are 1 to 200 of"),
        ("edgebroker publish ''", b"x", 2, "topic names are 1 to 200 of"),
        ("edgebroker publish a.dlq", b"x", 1, "the suffix .dlq is reserved"),
        ("edgebroker publish t --rate nan", b"x", 2, "'nan' is not a rate"),
        ("edgebroker publish t --csv /", b"", 2, "/: Is a directory"),
        ("edgebroker publish t --csv /nowhere", b"", 2, "/nowhere: No such file"),
        ("edgebroker publish t --csv /dev/stdin", b"a,b\n1,\xff\n", 2, "line 2: the byte 0xff is not UTF-8"),
        ("edgebroker publish t --csv /dev/stdin", b'a,b\n1,"2\n', 2, "a quote is not closed"),
        ("edgebroker publish t --csv /dev/stdin", b"a\n" + LARGE + b"\n", 1, "row 1: a record of .* is too large"),
        ("edgebroker publish t <&-", b"", 2, "standard input is closed"),
        ("edgebroker consume t --from 99999999999999999999999", b"", 2, "use earliest, latest"),
        ("edgebroker consume t --from @99999999999999999999999", b"", 2, "use earliest, latest"),
        ("edgebroker consume t --from -5", b"", 2, "use earliest, latest"),
        ("edgebroker consume t --from ''", b"", 2, "use earliest, latest"),
        ("edgebroker consume t --timeout 1e400", b"", 2, "is not a duration"),
        ("edgebroker consume t --count x", b"", 2, "--count"),
        ("edgebroker consume $'\\xfe'", b"", 2, "is not UTF-8"),
        ("edgebroker consume 'a b'", b"", 2, "topic names are 1 to 200 of"),
        ("edgebroker consume t --group ' '", b"", 2, "group names are 1 to 200 of"),
        ("edgebroker consume full --count 5000 >&-", b"", 2, "standard output is closed"),
        ("edgebroker consume full --count 5000 >/dev/full", b"", 1, "No space left on device"),
        ("edgebroker consume full --count 5000 | head -1", b"", 0, ""),
        ("edgebroker topic create t", b"", 1, "exists"),
        ("edgebroker topic create $(printf '%0300d' 1)", b"", 1, "topic names are"),
        ("edgebroker topic create x --partitions 0", b"", 1, "partitions"),
        ("edgebroker topic describe nothing", b"", 1, "there is no topic nothing"),
        ("edgebroker topic list >/dev/full", b"", 1, "No space left on device"),
        ("edgebroker group describe 'a/../b'", b"", 1, "no group"),
        ("edgebroker status --admin nowhere.invalid", b"", 3, "no broker answers at nowhere"),
        ("edgebroker status --admin 127.0.0.1:1", b"", 3, "no broker answers at 127.0.0.1:1"),
        ("edgebroker status --admin unix:/nowhere", b"", 3, "no broker answers"),
        ("edgebroker config check /", b"", 2, "Is a directory"),
        ("edgebroker config check /dev/stdin", b"\xff\xfe", 2, "UTF-8"),
        ("edgebroker log verify /bin/ls", b"", 2, "/bin/ls: not a segment file"),
        ("edgebroker log verify /dev/null", b"", 2, "/dev/null: not a file or directory"),
        ("edgebroker log verify /nowhere", b"", 2, "/nowhere"),
        ("edgebroker backup /proc/nowhere", b"", 1, "/proc/nowhere"),
        ("edgebroker restore /nowhere --data-dir x", b"", 2, "/nowhere"),
        ("edgebroker nonsense", b"", 2, "is not a command"),
        ("edgebroker --nonsense", b"", 2, "unrecognized"),
    ],
)  # fmt: skip
def test_a_sentence(broker: RunningBroker, line: str, given: bytes, code: int, said: str, tmp_path: Path) -> None:
    found, out, errors = run(broker, line, given, directory=tmp_path)
    assert (found, bool(re.search(said, errors))) == (code, True), f"{found}: {out[:200]} {errors}"


def test_bad_lines_are_left_out(broker: RunningBroker) -> None:
    broker.create("lines")
    given = b"a\n" + LARGE + b"\nb\n" + LARGE + b"\nc"
    code, out, errors = run(broker, "edgebroker publish lines --skip-bad --json", given)
    assert (code, out) == (0, '{"topic": "lines", "partition": 0, "first_offset": 0, "count": 3}\n')
    assert re.fullmatch(r"edgebroker: left out 2 lines; the first is line 2: a record of .*\n", errors)
    with broker.consumer(["lines"], start="earliest", timeout=10.0) as consumer:
        assert [record.value for record in take(consumer, 3)] == [b"a", b"b", b"c"]


def test_all_that_is_acknowledged_is_written(broker: RunningBroker) -> None:
    """Also what comes before a line that ends the command."""
    broker.create("before")
    code, out, _ = run(broker, "edgebroker publish before --json", b"a\nb\n" + LARGE)
    assert (code, out) == (1, '{"topic": "before", "partition": 0, "first_offset": 0, "count": 2}\n')
    code, _, errors = run(broker, "edgebroker publish before --json", b"a\n" * 5000, redirect=">/dev/full")
    assert (code, "No space left on device" in errors) == (1, True)
