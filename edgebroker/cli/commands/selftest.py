"""`edgebroker selftest`: real checks of this program, also as a frozen binary. Prints how many passed."""

from __future__ import annotations

import argparse
import io
import sqlite3
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from edgebroker.cli.command import DeferredHandler, Parser
from edgebroker.common import batch, codecs
from edgebroker.common.crc32c import crc32c, crc32c_portable, implementation
from edgebroker.common.errors import EdgeBrokerError


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=selftest)


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
    _expect(crc32c(data) == crc32c_portable(data), "both implementations agree")
    return implementation()


def _codecs() -> str:
    for name in codecs.CODEC_BITS:
        encoded = batch.encode([(b"key", b"value " * 50, 1)], codec=name)
        _expect(batch.decode(encoded)[0].value == b"value " * 50, f"a record survives {name}")
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
    """Load every command: a frozen program may lack modules that are imported by a computed name."""
    from edgebroker.cli.command import handlers
    from edgebroker.cli.main import build_parser

    found = list(handlers(build_parser()))
    for handler in found:
        loaded = handler.load() if isinstance(handler, DeferredHandler) else handler
        _expect(callable(loaded), f"{loaded} is a handler")
    return f"{len(found)} are complete"


def _progress() -> str:
    """Draw a progress bar, which other checks would not do: they have no terminal."""
    from tqdm import tqdm

    drawn = io.StringIO()
    with tqdm(total=2, file=drawn) as bar:
        bar.update(2)
    _expect("2/2" in drawn.getvalue(), "a full progress bar")
    return "drawn"


def _broker() -> str:
    """Store five records in a broker of its own, and receive them."""
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
    return "five records stored and delivered"


def _expect(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(f"expected: {what}")
