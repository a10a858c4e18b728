"""`edgebroker bench`: the flags of its sub-commands. The benchmarks are in cli/bench."""

from __future__ import annotations

from edgebroker.cli.command import (
    DeferredHandler,
    Parser,
    at_least,
    json_flag,
    rate,
    server_flag,
    subcommand,
    subcommands,
)


def arguments(parser: Parser) -> None:
    commands = subcommands(parser)
    workloads = {
        name: subcommand(commands, name, help, DeferredHandler("bench.workloads", name))
        for name, help in (
            ("produce", "publish as fast as possible"),
            ("consume", "read a topic as fast as possible"),
            ("latency", "measure the time from publish to delivery, at a fixed rate"),
            ("connections", "publish from many connections, one record at a time each"),
            ("fanout", "deliver one topic to many consumers, every record to each"),
        )
    }
    for workload in workloads.values():
        _workload_flags(workload)
    workloads["latency"].add_argument("--rate", type=rate, default=1000.0, help="records a second (default 1000)")
    workloads["connections"].add_argument(
        "--connections", type=at_least(1), default=64, help="connections (default 64)"
    )
    workloads["fanout"].add_argument("--consumers", type=at_least(1), default=100, help="consumers (default 100)")
    workloads["fanout"].set_defaults(count=20_000)
    everything = subcommand(
        commands,
        "all",
        "benchmark this machine and print one page that says what to expect of it",
        DeferredHandler("bench.target", "bench_all"),
    )
    everything.add_argument("directory", nargs="?", default=".", help="a directory on the disk to measure (default .)")
    everything.add_argument("--report", metavar="FILE", help="also write the page to FILE; as JSON when named *.json")
    disk = subcommand(
        commands,
        "disk",
        "measure a disk: append and sync, sequential writes",
        DeferredHandler("bench.workloads", "disk"),
    )
    disk.add_argument("directory", nargs="?", default=".", help="a directory on the disk to measure (default .)")
    for measurement in (everything, disk):
        json_flag(measurement)


def _workload_flags(parser: Parser) -> None:
    server_flag(parser)
    json_flag(parser)
    parser.add_argument("--topic", default="bench", help="topic to use (default bench); it is not deleted afterwards")
    parser.add_argument("--size", type=at_least(1), default=128, help="bytes of a value (default 128)")
    parser.add_argument("--count", type=at_least(1), default=100_000, help="records (default %(default)s)")
    parser.add_argument("--batch", type=at_least(1), default=100, help="records in a batch (default 100)")
    parser.add_argument(
        "--unacked", type=at_least(1), default=10_000, help="unacknowledged records at most (default 10000)"
    )
    parser.add_argument(
        "--ack",
        choices=("replicated", "durable", "written", "none"),
        default="durable",
        help="ack level (default durable)",
    )
    parser.add_argument("--client", choices=("c", "python"), default="c", help="client to use (default c)")
