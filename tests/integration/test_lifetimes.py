"""Clients when their process forks, ends, is interrupted or drops them: records are stored, or it is said that they are
not."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.brokers import SECONDS, RunningBroker, running, take
from tests.kit.waiting import wait_for

pytestmark = pytest.mark.slow


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[RunningBroker]:
    with running(tmp_path / "data") as found:
        yield found


def run(broker: RunningBroker, program: str) -> subprocess.CompletedProcess[str]:
    """A Python program that has the broker's address as SERVER."""
    head = f"import os, sys, time\nfrom edgebroker import Consumer, Producer\nSERVER = {broker.server!r}\n"
    return subprocess.run(
        [sys.executable, "-c", head + program], capture_output=True, text=True, timeout=30.0, check=False
    )


def values(broker: RunningBroker, count: int) -> list[bytes]:
    with broker.consumer(["t"], start="earliest", timeout=10.0) as consumer:
        return [record.value or b"" for record in take(consumer, count)]


def test_a_process_that_forgets_to_close(broker: RunningBroker) -> None:
    ended = run(broker, "p = Producer(SERVER, linger_ms=60000)\nfor n in range(100): p.send('t', b'%d' % n)\n")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert values(broker, 100) == [b"%d" % number for number in range(100)]


def test_a_process_that_fails(broker: RunningBroker) -> None:
    ended = run(broker, "p = Producer(SERVER, linger_ms=60000)\np.send('t', b'v')\nraise SystemExit(5)\n")
    assert ended.returncode == 5
    assert values(broker, 1) == [b"v"]


def test_what_cannot_be_stored_any_more_is_said(broker: RunningBroker) -> None:
    program = (
        "from edgebroker.client.publish import sender\nsender.EXIT_SECONDS = 0.2\n"
        "p = Producer(SERVER)\np.send('t', b'v').result(10)\nprint('up', flush=True)\nsys.stdin.readline()\n"
        "for n in range(3): p.send('t', b'v')\n"
    )
    head = f"import os, sys, time\nfrom edgebroker import Consumer, Producer\nSERVER = {broker.server!r}\n"
    with subprocess.Popen(
        [sys.executable, "-c", head + program],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        broker.stop()
        _, said = process.communicate("\n", 30.0)
    assert said.splitlines()[-1] == "3 records were not acknowledged when the process ended"
    assert "Traceback" not in said


def test_an_interrupted_process_stores_what_was_sent(broker: RunningBroker) -> None:
    program = (
        # Who starts the tests may ignore it.
        "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "with Producer(SERVER, linger_ms=60000) as p:\n    p.send('t', b'v')\n    print('sent', flush=True)\n"
        "    time.sleep(30)\n"
    )
    head = f"import os, sys, time\nfrom edgebroker import Consumer, Producer\nSERVER = {broker.server!r}\n"
    with subprocess.Popen(
        [sys.executable, "-c", head + program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "sent\n"
        process.send_signal(signal.SIGINT)
        process.wait(SECONDS)
    assert values(broker, 1) == [b"v"]


def test_a_fork(broker: RunningBroker) -> None:
    """The child is told; the parent goes on, and its connections end with it although the child lives longer."""
    ended = run(
        broker,
        """
p = Producer(SERVER)
p.send('t', b'parent').result(10)
c = Consumer(SERVER, ['t'], 'g')
c.poll(10)
sent = p.send('t', b'in flight')
pid = os.fork()
if not pid:
    for what in (lambda: p.send('t', b'child'), c.poll, lambda: next(iter(c))):
        try:
            what()
        except ValueError as error:
            print(error)
    p.close(); c.close()
    with Producer(SERVER) as own:
        own.send('t', b'own').result(10)
    sys.stdout.flush()
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), sent.result(10) >= 0)
print(p.send('t', b'after').result(10) > 0, len(c.poll(10)) > 0)
p.close(); c.close()
""",
    )
    assert ended.stderr == ""
    assert ended.stdout.splitlines() == [
        "the producer was made before the process forked; make another one in this process",
        "the consumer was made before the process forked; make another one in this process",
        "the consumer was made before the process forked; make another one in this process",
        "7 True",
        "True True",
    ]
    assert sorted(values(broker, 4)) == [b"after", b"in flight", b"own", b"parent"]


def test_the_child_does_not_hold_the_connections_of_its_parent(broker: RunningBroker) -> None:
    ended = run(
        broker,
        """
p = Producer(SERVER)
p.send('t', b'v').result(10)
r, w = os.pipe()
if not os.fork():
    os.read(r, 1)
    os._exit(0)
p.close()
import http.client
for _ in range(1000):
    a = http.client.HTTPConnection(ADMIN)
    a.request('GET', '/v1/clients')
    said = a.getresponse().read()
    if b'client_id' not in said:
        print('closed')
        break
    time.sleep(0.01)
os.write(w, b'x')
os.wait()
""".replace("ADMIN", repr("{}:{}".format(*broker.broker.listeners.http_address))),
    )
    assert (ended.stdout, ended.stderr) == ("closed\n", "")


def test_a_consumer_that_is_dropped_leaves_its_group(broker: RunningBroker) -> None:
    broker.create("t")
    consumer = broker.consumer(["t"], "g")
    consumer.poll(0.5)
    wait_for(lambda: members(broker) == 1, "it joins")
    del consumer
    gc.collect()
    wait_for(lambda: members(broker) == 0, "it leaves")


def members(broker: RunningBroker) -> int:
    status, group = broker.http("GET", "/v1/groups/g")
    return len(group["members"]) if status == 200 else 0
