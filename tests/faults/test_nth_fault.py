"""The nth-fault loop: the same small workload once for each file call it makes, with that call failing.

A fault of one call: the broker goes on or refuses (DISK_FULL, READ_ONLY), never dies, never loses. A fault of every
call from one on, until it is switched off: reads go on, and after ENOSPC writing resumes by itself within 5 s. A kill
in the middle of any call: the next start finds everything. EB_FAULTS_FULL=1 takes every call instead of a sample.
"""

import os
import random
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer, Sent
from edgebroker.common.errors import AnswerError, EdgeBrokerError, UnreachableError
from tests.kit.waiting import wait_for

from . import shim
from .checker import ConsumerHistory, History, check_groups, read_back
from .traffic import SETTINGS, send_value

pytestmark = [pytest.mark.skipif(not shim.available(), reason="needs Linux and gcc"), pytest.mark.slow]

FULL = os.environ.get("EB_FAULTS_FULL") == "1"
SEED = int(os.environ.get("EB_FAULTS_SEED", "3"))
TOPIC, GROUP, PARTITIONS = "orders", "readers", 2
NEW_TOPIC = {"name": TOPIC, "partitions": PARTITIONS, "segment_bytes": 64 << 10, "retention_bytes": 40 << 10}
REFUSALS = {"DISK_FULL", "READ_ONLY"}
ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT")
OPS = ("write", "pwrite", "sync", "fallocate", "ftruncate", "open", "rename", "unlink", "mkdir")
CLIENT_SECONDS = 20.0
RESUME_SECONDS = 5.0 + 2.0


class Run:
    """One broker under one fault, with a client that publishes, rolls, consumes and commits."""

    def __init__(self, path: Path, rules: list[str], *, switched: bool = False) -> None:
        self.history, self.root = History(), path / "data"
        self.consumed = ConsumerHistory(GROUP)
        self.history.consumers.append(self.consumed)
        self.count, self.switch = path / "count", path / "switch"
        environment = shim.environment(rules, self.root, self.switch if switched else None, self.count)
        self.broker = BrokerProcess(self.root, settings=SETTINGS, environment=environment)
        self.context = f"EB_FAULTS_SEED={SEED}, {rules}"
        self.n = 0

    def alive(self) -> bool:
        process = self.broker.process
        return process is not None and process.poll() is None

    def create(self) -> str:
        """Make the topic; what the broker said when it refused, "" when it did not."""
        try:
            call(self.broker.admin, "POST", "/v1/topics", NEW_TOPIC)
        except EdgeBrokerError as error:
            if "exists" not in str(error):
                return str(error)
        return ""

    def publish(self, producer: Producer, waves: int) -> set[str]:
        """Publish so that segments roll; the codes of refusals seen."""
        codes: set[str] = set()
        for _ in range(waves * 8):
            n, self.n = self.n, self.n + 1
            size = (300, 9000, 40, 15000)[n % 4]
            sent = send_value(self.history, producer, TOPIC, n // 2 % PARTITIONS, "p", n, size)
            if n % 3 == 0 and not codes:
                codes |= self._outcome(producer, sent)
        return codes

    def _outcome(self, producer: Producer, sent: Sent) -> set[str]:
        """Wait for an answer, or until the producer was told that it is to try again later."""
        seen: set[str] = set()

        def told() -> bool:
            error = producer._sender._last_error
            if isinstance(error, AnswerError):
                seen.add(error.code.name)
            return sent.done() or bool(seen & REFUSALS) or not self.alive()

        wait_for(told, f"an answer ({self.context})", CLIENT_SECONDS)
        return seen

    def consume(self, seconds: float = 5.0) -> None:
        """Read the log to its durable end as the group, and store that."""
        lines = call(self.broker.admin, "GET", f"/v1/topics/{TOPIC}")["partitions"]
        ends = {line["partition"]: line["durable_end"] for line in lines if line["durable_end"] > line["log_start"]}
        with Consumer(self.broker.server, [TOPIC], GROUP, auto_ack=False, start="earliest") as consumer:

            def at_the_end() -> bool:
                for record in consumer.poll(0.05):
                    self.consumed.saw(record.partition, record.offset, record.value or b"")
                    self.consumed.acknowledged(record.partition, record.offset + 1)
                    consumer.ack(record)
                    if record.offset + 1 >= ends.get(record.partition, 0):
                        ends.pop(record.partition, None)
                return not ends

            self.consumed.next_offset.clear()
            wait_for(at_the_end, f"reading goes on ({self.context})", seconds)

    def verify(self) -> None:
        """After a start without faults: nothing lost, writing works."""
        self.broker.kill()
        clean = BrokerProcess(self.root, settings=SETTINGS)
        clean.start()
        try:
            self.broker = clean
            assert self.create() == "", self.context
            with Producer(clean.server, client_id="after", timeout=CLIENT_SECONDS) as producer:
                assert self.publish(producer, 1) == set(), self.context
                producer.flush(CLIENT_SECONDS)
            content = read_back(clean, TOPIC)
            self.history.check(TOPIC, content, self.context, retention=True)
            check_groups(clean, self.history, TOPIC, content, self.context)
            assert clean.stop() == 0, self.context
        finally:
            clean.kill()


def workload(run: Run) -> set[str]:
    """Topic, publishing with rolls, consuming, retention, a clean stop; the codes of refusals seen."""
    codes: set[str] = set()
    with Producer(run.broker.server, client_id="p", timeout=CLIENT_SECONDS) as producer:
        try:
            refusal = run.create()
            if refusal and run.alive():
                wait_for(
                    lambda: run.create() == "" or not run.alive(), f"a topic is made ({run.context})", RESUME_SECONDS
                )
            for _ in range(2 if run.alive() else 0):
                codes |= run.publish(producer, 3)
            if codes <= {"DISK_FULL"}:
                wait_for(lambda: not producer.unacked or not run.alive(), f"writing ({run.context})", RESUME_SECONDS)
            if run.alive():
                run.consume()
                wait_for(lambda: retained(run) or bool(codes), f"retention ({run.context})", 4.0)
        except UnreachableError:
            wait_for(lambda: not run.alive(), f"a node that does not answer is dead ({run.context})", 5.0)
        except (EdgeBrokerError, TimeoutError):
            # One that is read-only accepts nothing more.
            if run.alive() and not read_only(run):
                raise
        finally:
            producer.close(0.0)
    return codes


def read_only(run: Run) -> bool:
    return "read_only" in call(run.broker.admin, "GET", "/v1/node")["problems"]


def retained(run: Run) -> bool:
    return bool(call(run.broker.admin, "GET", "/v1/node")["storage"]["removed_segments"])


def one_fault(path: Path, rule: str, *, dies: bool = False) -> None:
    """A run with one rule, then a start without it and the check."""
    run = Run(path, [rule])
    try:
        try:
            run.broker.start()
        except EdgeBrokerError:
            assert run.broker.process is not None
            code = run.broker.process.returncode
            assert dies or code in (1, 2, 75), f"exit code {code} ({run.context})"
        else:
            codes = workload(run)
            assert codes <= REFUSALS, f"{codes} ({run.context})"
            if run.alive():
                assert run.broker.stop() in ((0, 1, -signal.SIGKILL) if dies else (0, 1)), run.context
            elif not dies:
                raise AssertionError(f"the broker died ({run.context})")
        run.verify()
    finally:
        run.broker.kill()


def sample(rng: random.Random, points: int) -> Iterable[int]:
    return range(1, points + 1) if FULL else [rng.randint(1, points)]


def in_parallel(jobs: list[Callable[[], None]]) -> None:
    """Mostly waiting for two processes: some at a time."""
    with ThreadPoolExecutor(6) as pool:
        errors = [error for error in (future.exception() for future in [pool.submit(job) for job in jobs]) if error]
    if errors:
        shown = "\n".join(f"{type(error).__name__}: {error}" for error in errors)
        raise AssertionError(f"{len(errors)} of {len(jobs)} runs failed:\n{shown}") from errors[0]


@pytest.fixture(scope="module")
def points(tmp_path_factory: pytest.TempPathFactory) -> dict[str, int]:
    """How many calls of each kind the workload makes when nothing fails."""
    path = tmp_path_factory.mktemp("count")
    run = Run(path, [])
    with run.broker:
        assert workload(run) == set()
    found = shim.count_points(run.count)
    found["sync"] = sum(found[op] for op in ("fsync", "fdatasync", "syncfs"))
    run.verify()
    assert all(found[op] for op in OPS), found
    return dict(found)


@pytest.mark.parametrize("error", ERRORS)
def test_a_call_that_fails(tmp_path: Path, points: dict[str, int], error: str) -> None:
    rng = random.Random(f"{SEED} {error}")
    jobs: list[Callable[[], None]] = []
    for op in OPS if FULL or error in ("ENOSPC", "EIO") else rng.sample(OPS, 5):
        for n in sample(rng, points[op]):
            path = tmp_path / f"{op}-{n}"
            path.mkdir()
            jobs.append(lambda path=path, op=op, n=n: one_fault(path, f"{op}::{n}:{error}"))  # type: ignore[misc]
    in_parallel(jobs)


def test_a_kill_or_a_torn_write_in_a_call(tmp_path: Path, points: dict[str, int]) -> None:
    rng = random.Random(f"{SEED} kill")
    kinds = [(op, "kill") for op in OPS] + [("pwrite", "torn=700"), ("write", "torn=9"), ("rename", "kill_after")]
    jobs: list[Callable[[], None]] = []
    for op, action in kinds:
        for n in sample(rng, points[op]):
            path = tmp_path / f"{op}-{action}-{n}"
            path.mkdir()
            jobs.append(lambda path=path, rule=f"{op}::{n}:{action}": one_fault(path, rule, dies=True))  # type: ignore[misc]
    in_parallel(jobs)


@pytest.mark.parametrize("rule", ["pwrite:.log$:*:short=1000", "write::*:short=7", "pwrite:.log$:3:short=1"])
def test_short_writes_change_nothing(tmp_path: Path, rule: str) -> None:
    run = Run(tmp_path, [rule])
    with run.broker:
        assert workload(run) == set()
    run.verify()


@pytest.mark.parametrize("error", ERRORS)
def test_every_call_fails_for_a_while(tmp_path: Path, error: str) -> None:
    """Reads go on meanwhile; after a full disk writing resumes by itself, after the others at the latest restarted."""
    run = Run(tmp_path, [f"{op}::*:{error}" for op in OPS], switched=True)
    run.broker.start()
    try:
        with Producer(run.broker.server, client_id="p", timeout=60.0) as producer:
            assert run.create() == ""
            assert run.publish(producer, 2) == set()
            producer.flush(CLIENT_SECONDS)
            run.switch.touch()
            codes = run.publish(producer, 3)
            assert codes & REFUSALS, f"{codes} ({run.context})"
            run.consume()
            call(run.broker.admin, "GET", "/healthz")
            assert run.alive()
            run.switch.unlink()
            if error in ("ENOSPC", "EDQUOT"):
                # The producer asks again after at most two seconds.
                producer.flush(RESUME_SECONDS)
                assert not read_only(run), run.context
            else:
                producer.close(0.0)
        assert run.alive()
        run.verify()
    finally:
        run.broker.kill()
