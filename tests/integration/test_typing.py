"""The wheel is typed: a program of a user passes mypy --strict and pyright's strict mode against what is installed."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest

import edgebroker

ROOT = Path(__file__).parents[2]
SOURCES = ("edgebroker", "cext", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE")
PROGRAM = '''\
"""What a user may write, with every public name."""

from collections.abc import Callable, Sequence

import edgebroker
from edgebroker import (
    AnswerError,
    ArgumentError,
    AsyncConsumer,
    AsyncProducer,
    Code,
    Consumer,
    CorruptBatchError,
    Delivery,
    EdgeBrokerError,
    GapError,
    InflatedTooLargeError,
    Position,
    PositionFileError,
    Producer,
    Record,
    Refresh,
    ResetRequiredError,
    Sent,
    Staging,
    TopicPartition,
    UnreachableError,
)


async def receipts() -> int:
    async with AsyncProducer(Producer()) as producer:
        offset: int = await producer.send_and_wait("receipts", b"v", b"k", headers=[("a", None)])
        later: int = await (await producer.send("receipts", b"v"))
    async with AsyncConsumer(Consumer(topics=["receipts"])) as consumer:
        async for record in consumer:
            values: list[Record] = await consumer.poll(1.0)
            await consumer.ack(record)
            print(len(values))
    return offset + later


class Shelf:
    def __init__(self) -> None:
        self.rows: dict[bytes | None, bytes | None] = {}

    def begin(self, refresh: Refresh) -> int:
        share: float = refresh.progress
        print(refresh.reset_id, refresh.log_id.hex(), refresh.topic, refresh.partition, refresh.target, share)
        return refresh.from_offset if not refresh.complete else refresh.next_offset

    def load(self, refresh: Refresh, records: Sequence[Record]) -> None:
        self.rows.update((record.key, record.value) for record in records)

    def switch(self, refresh: Refresh) -> None: ...


def done(sent: Sent) -> None:
    error: Exception | None = sent.exception(1.0)
    if sent.done() and error is None:
        offset: int = sent.result(timeout=None)
        print(sent.topic, sent.partition, offset)


def publish() -> str:
    with Producer("127.0.0.1:7420", ack="written", compression="zstd", timeout=None, client_id="till") as producer:
        assert producer.open_topic("t") > 0
        sent = producer.send("t", b"v", b"k", headers=[("a", b"b"), ("c", None)], partition=0, timestamp=1)
        sent.add_done_callback(done)
        last: Sent | None = producer.send_many("t", [b"a", None], key=b"k")
        assert last is not None
        send: Callable[[str, bytes | None], Sent] = producer.send
        send("t", None)
        producer.flush(1.0)
        assert not producer.closed and producer.unacked == 0
        return producer.client_id


def handle(records: list[Record]) -> None:
    for record in records:
        name: str = record.topic
        headers: dict[str, bytes | None] = dict(record.headers)
        number: int = record.offset + record.timestamp + record.partition
        print(name, headers, number, record.key, record.value)


def consume(staging: Staging) -> dict[TopicPartition, int]:
    kept: dict[tuple[str, int], Position] = {("t", 0): Position(bytes(16), 1, 0)}

    def on_change(partitions: Sequence[TopicPartition]) -> None:
        print([(each.topic, each.partition) for each in partitions])

    def on_delivery(one: Delivery) -> None:
        print(one.topic, one.partition, one.log_id, one.epoch, one.first, one.last, len(one.batches))

    with Consumer(
        "127.0.0.1:7420", ["t"], "g", start="@0", positions=kept, position_file="positions", staging=staging,
        on_delivery=on_delivery,
        on_gap=print, on_assigned=on_change, on_revoked=on_change, window_records=10, window_bytes=1000, auto_ack=False,
    ) as consumer:
        for record in consumer:
            consumer.ack(record)
            consumer.nack(record, "no")
            break
        handle(consumer.poll(0.1))
        consumer.run(handle, 10, retry=True)
        consumer.ack_to("t", 0, 1)
        consumer.in_progress()
        consumer.commit(1.0)
        consumer.seek("t", 0, "earliest")
        consumer.pause("t", 0)
        consumer.resume("t", 0)
        consumer.refresh("t", 0)
        kept = consumer.positions()
        for key, position in kept.items():
            print(key[0], position.log_id, position.epoch, position.next_offset)
        lag = {key: end - consumer.next_offsets()[key] for key, end in consumer.durable_ends.items()}
        print(consumer.group, consumer.client_id, consumer.expired, consumer.assignment)
        return lag


def main() -> int:
    try:
        print(publish(), consume(Shelf()), edgebroker.__version__)
    except GapError as error:
        print(error.topic, error.partition, error.first, error.last, error.reason)
    except ResetRequiredError as error:
        print(error.topic, error.partition, error.log_id.hex(), error.log_start)
    except AnswerError as error:
        return int(error.code is Code.NO_SNAPSHOT or error.code.retryable) + error.offset
    except InflatedTooLargeError as error:
        print(error)
    except (UnreachableError, ArgumentError, CorruptBatchError, PositionFileError) as error:
        return error.exit_code
    except EdgeBrokerError as error:
        print(error)
    return 0
'''


# One wrong type in each line: a checker that sees no types of ours would accept them.
WRONG = """\
from edgebroker import Consumer, Position, Producer

offset: str = Producer().send("t", b"v").result()
Producer().send("t", "text")
Consumer(topics=["t"], positions={"t": Position(b"", 0, 0)})
for record in Consumer(topics=["t"]):
    record.offset = 1
"""
CHECKERS = {
    "mypy": ("mypy", "--strict", "--python-executable"),
    "pyright": ("pyright", "--pythonpath"),
}


def run(*command: object, cwd: Path, code: int = 0) -> str:
    """The output of a program that must end with this code."""
    environment = {**os.environ, "PYRIGHT_PYTHON_IGNORE_WARNINGS": "1", "EDGEBROKER_TRACE": ""}
    done = subprocess.run([str(each) for each in command], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has the wheel, and the dependencies of this one."""
    place = tmp_path_factory.mktemp("wheel")
    tree = place / "tree"
    tree.mkdir()
    for name in SOURCES:
        found = ROOT / name
        if found.is_dir():
            shutil.copytree(found, tree / name, ignore=shutil.ignore_patterns("*.so", "*.c", "__pycache__"))
        else:
            shutil.copy(found, tree / name)
    if (ROOT / "build" / "cython").is_dir():  # what is translated already need not be again
        shutil.copytree(ROOT / "build" / "cython", tree / "build" / "cython")
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    run(*pip, "wheel", ".", "--no-deps", "--no-build-isolation", "--no-index", "-w", place / "dist", cwd=tree)
    run(sys.executable, "-m", "venv", "--without-pip", place / "venv", cwd=place)
    own = next((place / "venv" / "lib").glob("python*")) / "site-packages"
    (wheel,) = (place / "dist").glob("*.whl")
    run(*pip, "install", "--no-deps", "--no-index", "--target", own, wheel, cwd=place)
    # A .pth adds the folder and none of the .pth files in it: not the editable install of this tree.
    (own / "dependencies.pth").write_text("".join(f"{folder}\n" for folder in site.getsitepackages()))
    return place / "venv" / "bin" / "python"


@pytest.mark.slow
@pytest.mark.parametrize("checker", CHECKERS)
def test_a_user_program_is_well_typed(checker: str, python: Path, tmp_path: Path) -> None:
    assert all(name in PROGRAM for name in edgebroker.__all__)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "wrong.py").write_text(WRONG)
    (tmp_path / "pyrightconfig.json").write_text('{"typeCheckingMode": "strict"}')
    where = run(python, "-c", "import edgebroker, program; print(edgebroker.__file__)", cwd=tmp_path)
    assert str(python.parents[1]) in where, "not the one that was installed"
    check = (sys.executable, "-m", *CHECKERS[checker], python)
    run(*check, "program.py", cwd=tmp_path)
    found = run(*check, "wrong.py", cwd=tmp_path, code=1)
    assert {line for line in range(3, 8) if f"wrong.py:{line}" in found} == {3, 4, 5, 7}, found
