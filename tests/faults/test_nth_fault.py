"""The nth-fault loop: the same small workload once for each file call it makes, with that call failing.

A fault of one call: the broker goes on or refuses (DISK_FULL, READ_ONLY), never dies, never loses. A fault of every
call from one on, until it is switched off: reads go on, and after ENOSPC writing resumes by itself within 5 s. A kill
in the middle of any call: the next start finds everything. EB_FAULTS_FULL=1 takes every call instead of a sample.
"""

import os
import random
import socket
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from edgebroker.cli.adminclient import call
from edgebroker.cli.process import BrokerProcess
from edgebroker.common.errors import AnswerError, EdgeBrokerError
from edgebroker.network.consumer import Consumer
from edgebroker.network.producer import Producer, Sent

from . import shim
from .checker import Ack, ConsumerHistory, History, check_groups, read_back, value_of
from .traffic import SETTINGS, until

pytestmark = [pytest.mark.skipif(not shim.available(), reason="needs Linux and gcc"), pytest.mark.slow]

FULL = os.environ.get("EB_FAULTS_FULL") == "1"
SEED = int(os.environ.get("EB_FAULTS_SEED", "3"))
TOPIC, GROUP, PARTITIONS = "orders", "readers", 2
NEW_TOPIC = {"name": TOPIC, "partitions": PARTITIONS, "segment_bytes": 64 << 10, "retention_bytes": 40 << 10}
REFUSALS = {"DISK_FULL", "READ_ONLY"}
ERRORS = ("ENOSPC", "EIO", "EROFS", "EDQUOT")
OPS = ("write", "pwrite", "sync", "fallocate", "ftruncate", "open", "rename", "unlink", "mkdir")
CLIENT_SECONDS = 20.0


class Fault(NamedTuple):
    """One run: rule and whether it is in force from the first start on or switched on under way."""

    rule: str

    @property
    def error(self) -> str:
        return self.rule.rpartition(":")[2]


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
            self.history.sending("p", n)
            value = value_of("p", n, (300, 9000, 40, 15000)[n % 4])
            sent = producer.send(TOPIC, value, partition=n // 2 % PARTITIONS)
            sent.add_done_callback(lambda sent, n=n: self._answered(sent, n))
            if n % 3 == 0 and not codes:
                codes |= self._outcome(producer, sent)
        return codes

    def _answered(self, sent: Sent, n: int) -> None:
        if sent.exception(0) is None:
            self.history.acknowledged(Ack(TOPIC, sent.partition, sent.result(0), "p", n, "durable"))

    def _outcome(self, producer: Producer, sent: Sent) -> set[str]:
        """Wait for an answer, or until the producer was told that it is to try again later."""
        seen: set[str] = set()

        def told() -> bool:
            error = producer.last_error
            if isinstance(error, AnswerError):
                seen.add(error.code.name)
            return sent.done() or bool(seen & REFUSALS) or not self.alive()

        until(told, CLIENT_SECONDS, f"an answer ({self.context})")
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
            until(at_the_end, seconds, f"reading goes on ({self.context})")

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
