"""`edgebroker bench produce|consume|latency|connections|fanout|disk`: benchmark a running broker or a disk.

Comparisons with other brokers and with the limits of the machine are in benchmarks/ of the source tree.
"""

from __future__ import annotations

import argparse
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from edgebroker.cli.bench import disk as limits
from edgebroker.cli.bench import native_client
from edgebroker.cli.bench.disk import CLOCK, percentile
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import ACK_LEVELS, Producer
from edgebroker.client.servers import Servers
from edgebroker.common.errors import ConfigError, UnreachableError

Measured = TypeVar("Measured")


def produce(options: argparse.Namespace) -> int:
    if options.client == "c":
        seconds = _run_native(
            options,
            lambda host, port, name: native_client.produce(
                host,
                port,
                options.topic.encode(),
                options.count,
                options.size,
                options.batch,
                options.unacked,
                ACK_LEVELS[options.ack],
                name,
            ),
        )
    else:
        seconds = python_produce(
            options.server, options.topic, options.count, options.size, options.batch, options.unacked, options.ack
        )
    return _print_rate(options, seconds)


def consume(options: argparse.Namespace) -> int:
    if options.client == "c":
        group = f"bench-{secrets.token_hex(4)}".encode()
        seconds = _run_native(
            options,
            lambda host, port, name: native_client.consume(
                host, port, options.topic.encode(), group, options.count, 0, name
            ),
        )
    else:
        seconds = python_consume(options.server, options.topic, options.count)
    return _print_rate(options, seconds)


def latency(options: argparse.Namespace) -> int:
    group = f"bench-{secrets.token_hex(4)}".encode()
    level = ACK_LEVELS[options.ack]

    def measure(host: bytes, port: int, name: bytes) -> list[float]:
        native_client.one_by_one(host, port, options.topic.encode(), 1, options.size, level, name)
        count = min(options.count, int(options.rate * 60))
        return native_client.push(
            host, port, options.topic.encode(), group, count, options.size, options.rate, level, name + b"-push"
        )

    return _print_latency(options, _run_native(options, measure))


def connections(options: argparse.Namespace) -> int:
    seconds = _run_native(
        options,
        lambda host, port, name: native_client.many(
            host,
            port,
            options.topic.encode(),
            options.connections,
            options.count,
            options.size,
            ACK_LEVELS[options.ack],
            name,
        ),
    )
    return _print_rate(options, seconds)


def fanout(options: argparse.Namespace) -> int:
    """The time until every consumer has every record. Uses the C client, whatever --client says."""
    seconds, ready, _ = _run_native(
        options,
        lambda host, port, name: native_client.fanout(
            host, port, options.topic.encode(), options.consumers, options.count, options.size, options.batch, 0.0, name
        ),
    )
    rate = options.count * options.consumers / seconds
    result = {
        "consumers": options.consumers,
        "records": options.count,
        "seconds": round(seconds, 6),
        "deliveries_per_second": round(rate),
        "all_receiving_after_ms": round(ready * 1000, 1),
    }
    text = f"{rate:,.0f} deliveries/s; every consumer had a record {ready * 1000:.0f} ms after the first one connected"
    print(json.dumps(result) if options.json else text)
    return 0


def disk(options: argparse.Namespace) -> int:
    directory = Path(options.directory)
    if not directory.is_dir():
        raise ConfigError(f"{directory}: no such directory")
    appends = limits.append_and_sync(directory, 500)
    result = {
        "append_4k_fdatasync_p50_us": round(percentile(appends, 0.5) * 1e6, 1),
        "append_4k_fdatasync_p99_us": round(percentile(appends, 0.99) * 1e6, 1),
        "write_1m_synced_each_mb_s": round(limits.sequential(directory, 128 << 20, 1 << 20, sync_each=True) / 1e6, 1),
        "write_1m_synced_once_mb_s": round(limits.sequential(directory, 256 << 20, 1 << 20, sync_each=False) / 1e6, 1),
    }
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:32} {value}")
    return 0


def python_produce(
    server: str, topic: str, count: int, size: int, batch: int, unacked: int, ack: str, timeout: float = 120.0
) -> float:
    """Seconds in which the public Producer sends `count` records, one send() each, and all are acknowledged."""
    value = b"x" * size
    with Producer(
        server, ack=ack, batch_records=batch, max_unacked=unacked, batch_bytes=1 << 20, timeout=timeout
    ) as producer:
        producer.send(topic, value).result(timeout)
        send = producer.send
        began = CLOCK.monotonic()
        for _ in range(count):
            sent = send(topic, value)
        producer.flush(timeout)
        sent.result(timeout)
        return CLOCK.monotonic() - began


def python_consume(server: str, topic: str, count: int) -> float:
    """Seconds from the subscription until the public Consumer has returned `count` decoded records."""
    began = CLOCK.monotonic()
    seen = 0
    with Consumer(server, [topic], start="earliest", timeout=30.0) as consumer:
        for record in consumer:
            seen += 1 if record.value is not None else 0
            if seen >= count:
                break
    return CLOCK.monotonic() - began


def _run_native(options: argparse.Namespace, measure: Callable[[bytes, int, bytes], Measured]) -> Measured:
    """Run `measure` with host, port and a client name for the C client; its errors become ours."""
    server = Servers(options.server).current
    try:
        return measure(server.host.encode(), server.port, f"bench-{secrets.token_hex(4)}".encode())
    except OSError as error:
        raise UnreachableError(
            f"{options.server}: {error.strerror}; is the broker running, and does topic {options.topic} exist?"
        ) from error


def _print_rate(options: argparse.Namespace, seconds: float) -> int:
    rate = options.count / seconds
    result = {
        "records": options.count,
        "seconds": round(seconds, 6),
        "records_per_second": round(rate),
        "mb_per_second": round(rate * options.size / 1e6, 1),
    }
    print(json.dumps(result) if options.json else f"{rate:,.0f} records/s, {rate * options.size / 1e6:,.1f} MB/s")
    return 0


def _print_latency(options: argparse.Namespace, seconds: list[float]) -> int:
    shares = {"p50_us": 0.5, "p90_us": 0.9, "p99_us": 0.99, "max_us": 1.0}
    result = {name: round(percentile(seconds, share) * 1e6, 1) for name, share in shares.items()}
    text = ", ".join(f"{name[:-3]} {value:,.0f} us" for name, value in result.items())
    print(json.dumps({"records": len(seconds), **result}) if options.json else text)
    return 0
