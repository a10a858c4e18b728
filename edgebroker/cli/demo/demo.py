"""`edgebroker demo`: what a broker is for, shown and checked on real retail data.

First one broker: it stores 30,000 sales lines in four partitions and delivers them to a consumer. When the consumer has
40 % of them and publishes are unacknowledged, the broker is killed with SIGKILL and started again. Then the same with a
tree of five brokers (tree_demo.py). Line numbers in the record headers show that the consumer received every line, in
order per partition.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib.resources import files as package_files
from pathlib import Path

from edgebroker.cli.admin_client import call
from edgebroker.cli.broker_process import BrokerProcess
from edgebroker.cli.demo.tree_demo import LEVELS, DemoTree
from edgebroker.cli.pace import Pace
from edgebroker.cli.progress import progress
from edgebroker.cli.totals import record_count
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.client.publish.accumulator import Sent
from edgebroker.common.batch import partition_for
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.common.records import Record
from edgebroker.common.runtime.clock import SystemClock
from edgebroker.common.runtime.threads import start_thread

PARTITIONS = 4
KILL_AT = 0.4
DEADLINE_SECONDS = 120.0
SYMBOLS = (b"AAPL", b"GOOGL", b"MSFT", b"TSLA", b"AMZN")


def demo(options: argparse.Namespace) -> int:
    with tempfile.TemporaryDirectory(prefix="edgebroker-demo-") as directory:
        one = _one_broker(Path(directory), options.rate)
        problems = judge(one)
        if not options.json:
            _print(one)
        tree = _tree(Path(directory), options.rate)
        problems += judge_tree(tree)
    if options.json:
        print(json.dumps({"one": one, "tree": tree, "problems": problems}))
    else:
        _print_tree(tree)
        print("FAILED: " + "; ".join(problems) if problems else "everything holds")
    return 1 if problems else 0


def _one_broker(directory: Path, rate: int) -> dict[str, object]:
    settings = {"EDGEBROKER_STORAGE_SEGMENT_BYTES": str(256 << 10), "EDGEBROKER_STORAGE_HARD_FREE_BYTES": "0"}
    broker = BrokerProcess(directory / "node", settings=settings)
    broker.start()
    try:
        _five_records(broker)

        def kill() -> None:
            broker.kill()
            broker.start()

        result = RetailRun(broker, broker, rate, kill).run()
        result["clean_stop"] = broker.stop() == 0
    finally:
        broker.kill()
    return result


def _tree(directory: Path, rate: int) -> dict[str, object]:
    print("starting a tree of five brokers, with TLS between them: " + " - ".join(LEVELS), file=sys.stderr)
    with DemoTree(directory) as tree:
        result = RetailRun(tree.root, tree.local, rate, tree.disturb, ready=tree.wait_for_topic).run()
        result["same_bytes"] = tree.wait_until_same("sales", PARTITIONS)
        result["applied"] = tree.wait_until_applied("sales", PARTITIONS)
        result["repaired"] = tree.repaired
        result["clean_stop"] = tree.stop()
    return result


def _five_records(broker: BrokerProcess) -> None:
    """Publish five records, receive them in order, and commit: the committed offset goes from 0 to 5."""
    with Producer(broker.server, timeout=20.0) as producer:
        offsets = [producer.send("stocks", symbol).result(20.0) for symbol in SYMBOLS]
    with Consumer(broker.server, ["stocks"], "traders", timeout=20.0, auto_ack=False) as consumer:
        records: list[Record] = []
        while len(records) < len(SYMBOLS):
            records += consumer.poll(20.0)
        before = _committed(broker, "traders")
        consumer.ack(records[-1])
        consumer.commit()
        after = _committed(broker, "traders")
    values = [record.value for record in records]
    if (offsets, values, before, after) != ([0, 1, 2, 3, 4], list(SYMBOLS), 0, 5):
        raise EdgeBrokerError(f"five records: offsets {offsets}, values {values}, committed offset {before} -> {after}")
    print("five records: stored, delivered in order and acknowledged; committed offset 0 -> 5", file=sys.stderr)


def _committed(broker: BrokerProcess, group: str) -> int:
    partitions = call(broker.admin, "GET", f"/v1/groups/{group}")["partitions"]
    return max(0, int(partitions[0]["committed"])) if partitions else 0


class RetailRun:
    """Publishes the retail lines at one broker and consumes them at another, or the same.

    When the consumer has 40 % of them, `disturb` is called. `ready` waits until the consuming broker has the topic.
    """

    def __init__(
        self,
        upper: BrokerProcess,
        lower: BrokerProcess,
        rate: int,
        disturb: Callable[[], None],
        ready: Callable[[str], None] = lambda topic: None,
    ) -> None:
        self._upper, self._lower, self._rate, self._disturb, self._ready = upper, lower, rate, disturb, ready
        self._clock = SystemClock()
        raw = package_files("edgebroker.cli").joinpath("data/online_retail.csv.gz").read_bytes()
        self._lines = list(csv.DictReader(io.StringIO(gzip.decompress(raw).decode())))
        self._acknowledged: set[int] = set()
        self._failed = 0
        self._seen: list[tuple[int, int]] = []
        self._latencies: list[float] = []
        self._sent_at = [0.0] * (len(self._lines) + 1)
        self._disturb_now = threading.Event()
        self._unacknowledged = 0
        self._down_ms = 0.0
        self._error: Exception | None = None

    def run(self) -> dict[str, object]:
        call(self._upper.admin, "POST", "/v1/topics", {"name": "sales", "partitions": PARTITIONS})
        self._ready("sales")
        began = self._clock.monotonic()
        threads = [start_thread("demo-consumer", self._consume), start_thread("demo-disturber", self._disturb_once)]
        self._publish()
        published = self._clock.monotonic() - began
        for thread in threads:
            thread.join(DEADLINE_SECONDS)
        if self._error is not None:
            raise EdgeBrokerError(f"the demonstration failed: {self._error}") from self._error
        topic = call(self._upper.admin, "GET", "/v1/topics/sales")
        latencies = sorted(self._latencies) or [0.0]
        return {
            "lines": len(self._lines),
            "acknowledged": len(self._acknowledged),
            "refused": self._failed,
            "seen": len(self._seen),
            "distinct": len({number for _, number in self._seen}),
            "redelivered": len(self._seen) - len({number for _, number in self._seen}),
            "missing": len(set(range(1, len(self._lines) + 1)) - {number for _, number in self._seen}),
            "out_of_order": self._out_of_order(),
            "in_wrong_partition": self._in_wrong_partition(),
            "stored": record_count(topic),
            "sealed_segments": sum(part["segments"] - 1 for part in topic["partitions"]),
            "unacknowledged_at_kill": self._unacknowledged,
            "down_ms": round(self._down_ms),
            "publish_per_second": round(len(self._lines) / published),
            "push_p50_ms": round(latencies[len(latencies) // 2] * 1000, 3),
            "push_p99_ms": round(latencies[len(latencies) * 99 // 100] * 1000, 3),
            "seconds": round(self._clock.monotonic() - began, 1),
        }

    def _publish(self) -> None:
        bar = progress(len(self._lines), "line")
        pace = Pace(self._rate)
        with Producer(self._upper.server, timeout=60.0, linger_ms=1.0) as producer:
            for number, line in enumerate(self._lines, 1):
                pace.wait(number)
                self._sent_at[number] = self._clock.monotonic()
                sent = producer.send(
                    "sales",
                    json.dumps(line, ensure_ascii=False).encode(),
                    line["StockCode"].encode(),
                    headers=[("line", str(number).encode())],
                )
                sent.add_done_callback(partial(self._on_done, number))
                bar.update(1)
            producer.flush(60.0)
        bar.close()

    def _on_done(self, number: int, sent: Sent) -> None:
        if sent.exception() is None:
            self._acknowledged.add(number)
        else:
            self._failed += 1

    def _consume(self) -> None:
        try:
            wanted = len(self._lines)
            distinct: set[int] = set()
            with Consumer(self._lower.server, ["sales"], "tills", timeout=60.0, auto_ack=False) as consumer:
                while len(distinct) < wanted:
                    records = consumer.poll(30.0)
                    if not records:
                        return
                    now = self._clock.monotonic()
                    for record in records:
                        number = int(record.headers[0][1] or b"0")
                        self._seen.append((record.partition, number))
                        if number not in distinct:
                            distinct.add(number)
                            self._latencies.append(now - self._sent_at[number])
                    consumer.ack(records[-1])
                    if len(distinct) >= wanted * KILL_AT:
                        self._disturb_now.set()
                consumer.commit()
        except Exception as error:
            self._error = error
        finally:
            self._disturb_now.set()

    def _disturb_once(self) -> None:
        """Disturb once the consumer has 40 % and the producer waits for acknowledgements."""
        self._disturb_now.wait(DEADLINE_SECONDS)
        deadline = self._clock.monotonic() + 10.0
        while self._clock.monotonic() < deadline:
            waiting = sum(1 for sent in self._sent_at if sent) - len(self._acknowledged)
            if waiting > 0:
                break
        self._unacknowledged = waiting
        began = self._clock.monotonic()
        try:
            self._disturb()
        except EdgeBrokerError as error:
            self._error = error
        self._down_ms = (self._clock.monotonic() - began) * 1000

    def _out_of_order(self) -> int:
        """How many lines were first delivered after a later line of their partition."""
        newest: Counter[int] = Counter()
        first_seen: set[int] = set()
        wrong = 0
        for partition, number in self._seen:
            if number in first_seen:
                continue
            first_seen.add(number)
            wrong += number < newest[partition]
            newest[partition] = max(newest[partition], number)
        return wrong

    def _in_wrong_partition(self) -> int:
        keys = [line["StockCode"].encode() for line in self._lines]
        return sum(partition_for(keys[number - 1], PARTITIONS) != partition for partition, number in self._seen)


def _differing(result: dict[str, object]) -> list[str]:
    lines = result["lines"]
    expected = {
        "acknowledged": lines, "distinct": lines, "stored": lines, "missing": 0, "out_of_order": 0, "refused": 0,
        "in_wrong_partition": 0, "clean_stop": True,
    }  # fmt: skip
    return [f"{name} is {result[name]} instead of {value}" for name, value in expected.items() if result[name] != value]


def judge_tree(result: dict[str, object]) -> list[str]:
    """What went wrong in the tree."""
    problems = [f"in the tree {problem}" for problem in _differing(result)]
    if not result["same_bytes"]:
        problems.append("the logs of the five nodes differ")
    if not result["applied"]:
        problems.append("ROOT did not learn that LOCAL has applied everything")
    if not result["repaired"]:
        problems.append("the corrupt range was not repaired")
    return problems


def judge(result: dict[str, object]) -> list[str]:
    """What went wrong with the single broker."""
    problems = _differing(result)
    sealed, waiting = result["sealed_segments"], result["unacknowledged_at_kill"]
    assert isinstance(sealed, int) and isinstance(waiting, int)
    if sealed < 3:
        problems.append(f"only {sealed} segments were sealed, at least 3 were expected")
    if waiting < 1:
        problems.append("no publish was unacknowledged when the broker was killed")
    return problems


def _print_tree(result: dict[str, object]) -> None:
    print(f"five levels         {result['lines']} lines published at ROOT, {result['publish_per_second']}/s")
    print("disturbed           network L3 - POS cut, L3 and POS killed, a byte flipped at POS; restored in "
          f"{result['down_ms']} ms")  # fmt: skip
    print(f"repaired            {result['repaired']} records of a corrupt range, from the parent")
    print(f"consumer at LOCAL   {result['distinct']} of {result['lines']} lines, {result['missing']} missing, "
          f"{result['out_of_order']} out of order, {result['redelivered']} redelivered")  # fmt: skip
    applied = "every terminal has" if result["applied"] else "NOT every terminal has"
    print(f"report at ROOT      {applied} applied every record")
    print(f"SHA-256 of the logs {'identical on all five nodes' if result['same_bytes'] else 'NOT identical'}")
    print(f"took                {result['seconds']} s")


def _print(result: dict[str, object]) -> None:
    print(f"published           {result['lines']} lines, {result['publish_per_second']}/s, ack level durable")
    print(f"acknowledged        {result['acknowledged']} lines, {result['refused']} refused")
    print(
        f"killed              with {result['unacknowledged_at_kill']} unacknowledged, ready in {result['down_ms']} ms"
    )
    print(
        f"stored              {result['stored']} records in {PARTITIONS} partitions, "
        f"{result['sealed_segments']} sealed segments"
    )
    print(f"consumer received   {result['distinct']} of {result['lines']} lines, {result['missing']} missing, "
          f"{result['out_of_order']} out of order, {result['redelivered']} redelivered")  # fmt: skip
    print(f"delivery latency    p50 {result['push_p50_ms']} ms, p99 {result['push_p99_ms']} ms, including the outage")
    print(f"took                {result['seconds']} s")
