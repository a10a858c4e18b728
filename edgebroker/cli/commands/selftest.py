"""`edgebroker selftest`: a handful of real checks, also inside a frozen binary. Says how many ran."""

from __future__ import annotations

import argparse
import io
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from edgebroker.common import batch, codecs
from edgebroker.common.crc32c import crc32c, crc32c_portable, implementation
from edgebroker.common.errors import EdgeBrokerError


def selftest(options: argparse.Namespace) -> int:
    checks: list[Callable[[], str]] = [_crc, _codecs, _sqlite, _tls, _commands, _progress, _broker]
    failed = 0
    for check in checks:
        name = check.__name__.lstrip("_")
        try:
            print(f"{name}: {check()}", file=sys.stderr)
        except (EdgeBrokerError, AssertionError, OSError, sqlite3.Error, ImportError, AttributeError) as error:
            failed += 1
            print(f"{name}: FAILED: {error!r}", file=sys.stderr)
    print(f"{len(checks) - failed} of {len(checks)} checks passed")
    return 1 if failed else 0


def _crc() -> str:
    _expect(crc32c(b"123456789") == 0xE3069283, "the check value of CRC-32C")
    data = bytes(range(256)) * 300
    _expect(crc32c(data) == crc32c_portable(data), "both paths agree")
    return implementation()


def _codecs() -> str:
    for name in codecs.CODEC_BITS:
        encoded = batch.encode([(b"key", b"value " * 50, 1)], codec=name)
        _expect(batch.decode(encoded)[0].value == b"value " * 50, f"a record comes back from {name}")
    return ", ".join(codecs.CODEC_BITS)


def _sqlite() -> str:
    connection = sqlite3.connect(":memory:")
    try:
        return str(connection.execute("SELECT sqlite_version()").fetchone()[0])
    finally:
        connection.close()


def _tls() -> str:
    import ssl

    _expect(ssl.create_default_context().verify_mode is ssl.CERT_REQUIRED, "certificates are checked")
    return ssl.OPENSSL_VERSION


def _commands() -> str:
    """Each command is complete: a frozen program may lack what is imported by a name that is put together."""
    from edgebroker.cli.main import build_parser, commands

    found = list(commands(build_parser()))
    for module, function in found:
        _expect(callable(getattr(import_module(f"edgebroker.cli.{module}"), function)), f"{module}.{function} is there")
    return f"{len(found)} are complete"


def _progress() -> str:
    """A terminal sees a bar; nothing else would notice that it cannot be drawn."""
    from tqdm import tqdm

    drawn = io.StringIO()
    with tqdm(total=2, file=drawn) as bar:
        bar.update(2)
    _expect("2/2" in drawn.getvalue(), "a bar that is full")
    return "bars are drawn"


def _broker() -> str:
    """A broker in a process of its own stores five records and pushes them back."""
    from edgebroker.cli.broker_process import BrokerProcess
    from edgebroker.client.consumer import Consumer
    from edgebroker.client.producer import Producer

    with tempfile.TemporaryDirectory() as directory, BrokerProcess(Path(directory)) as broker:
        with Producer(broker.server, timeout=10.0) as producer:
            sent = [producer.send("selftest", b"%d" % number) for number in range(5)]
            _expect([one.result(10.0) for one in sent] == [0, 1, 2, 3, 4], "offsets 0 to 4")
        with Consumer(broker.server, ["selftest"], "selftest", timeout=10.0) as consumer:
            records = consumer.poll(10.0)
            _expect([record.value for record in records] == [b"0", b"1", b"2", b"3", b"4"], "five records in order")
    return "five records stored and pushed"


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"{what} does not hold")
