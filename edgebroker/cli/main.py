"""The command line: which verbs there are. Each verb's module is imported only when it runs.

Data goes to stdout, progress and logs to stderr. Exit codes: 0 ok, 1 failure, 2 usage or configuration,
3 unreachable, 4 damaged data found, 75 data directory in use, 130 interrupted.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module

from edgebroker.cli import environment
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.version import __version__

SERVER = "127.0.0.1:7420"
Parser = argparse.ArgumentParser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    parser = build_parser()
    # For a monitoring system 2 would be CRITICAL; what it does not know is UNKNOWN.
    wrong = 3 if list(sys.argv[1:] if arguments is None else arguments)[:1] == ["check"] else 2
    try:
        options = parser.parse_args(arguments)
    except SystemExit as error:
        if error.code == 2:
            return wrong
        raise
    if not hasattr(options, "run"):
        options.parser.print_help(sys.stderr)
        return wrong
    try:
        module, function = options.run
        command: Callable[[argparse.Namespace], int] = getattr(import_module(f"edgebroker.cli.{module}"), function)
        return command(options)
    except EdgeBrokerError as error:
        print(f"edgebroker: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output went away: no error, but nothing may be written at exit either.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> Parser:
    parser = Parser(prog="edgebroker", description="A durable message broker, from the cloud to the store terminal.")
    parser.add_argument("--version", action="version", version=f"edgebroker {__version__}")
    parser.set_defaults(parser=parser)
    verbs = parser.add_subparsers(title="commands", metavar="COMMAND")
    _serve(verbs)
    _appliance(verbs)
    _status(verbs)
    _publish(verbs)
    _consume(verbs)
    _topic(verbs)
    _repair(verbs)
    _verify(verbs)
    _promote(verbs)
    _backup(verbs)
    _admin(
        _verb(
            verbs,
            "pipe",
            "show the parent of a node, what it lacks, and the children it feeds",
            "commands.pipe",
            "pipe",
        )
    )
    _tree(verbs)
    _node(verbs)
    _reset(verbs)
    _group(verbs)
    _dlq(verbs)
    _log(verbs)
    _config(verbs)
    _bench(verbs)
    demo = _verb(verbs, "demo", "run the demonstration on real retail data and check it", "demo.demo", "demo")
    demo.add_argument("--rate", type=int, default=5000, help="records published a second (default 5000)")
    demo.add_argument("--json", action="store_true", help="print the result as JSON")
    _verb(verbs, "selftest", "check that this program is complete and works here", "commands.selftest", "selftest")
    version = _verb(verbs, "version", "print the version", "commands.version", "version")
    version.add_argument("--json", action="store_true")
    return parser


def commands(parser: Parser) -> Iterator[tuple[str, str]]:
    """(module, function) of every command below a parser."""
    if run := parser.get_default("run"):
        yield run
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for one in action.choices.values():
                yield from commands(one)


def _verb(verbs, name: str, text: str, module: str, function: str) -> Parser:  # type: ignore[no-untyped-def]
    parser: Parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(run=(module, function))
    return parser


def _family(verbs, name: str, text: str):  # type: ignore[no-untyped-def]
    parser = verbs.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
    parser.set_defaults(parser=parser)
    return parser.add_subparsers(title="commands", metavar="COMMAND")


def _serve(verbs) -> None:  # type: ignore[no-untyped-def]
    serve = _verb(verbs, "serve", "run a broker", "service.serve", "serve")
    serve.add_argument("-c", "--config", metavar="FILE", help="TOML file; without one, safe defaults on 127.0.0.1")
    serve.add_argument("--data-dir", metavar="DIR", help="where everything is stored")
    serve.add_argument("--listen", metavar="HOST:PORT", help="address of the binary protocol")
    serve.add_argument("--http", metavar="HOST:PORT", help="address of the admin and health interface")
    serve.add_argument("--ports-file", metavar="FILE", help="write the addresses here once both answer (for port 0)")


def _appliance(verbs) -> None:  # type: ignore[no-untyped-def]
    install = _verb(verbs, "install", "make this program a service of this machine", "appliance.install", "install")
    install.add_argument("--role", default="", choices=("root", "l2", "l3", "pos", "local"), help="level in the tree")
    install.add_argument("--id", default="", metavar="NAME", help="name of the node (default: the host name)")
    install.add_argument(
        "--parent", action="append", default=[], metavar="URL", help="http://HOST:PORT of a parent; again for a second"
    )
    install.add_argument("--registry", default="", metavar="URL", help="node through which the registry can be asked")
    install.add_argument("--region", default="", help="where it stands, as north/store-12")
    install.add_argument("--labels", default="", metavar="NAME=VALUE,...")
    install.add_argument(
        "--bind", default="", metavar="ADDRESS", help="listen here, for other machines; without it only on 127.0.0.1"
    )
    install.add_argument("--start", action="store_true", help="start it now, and wait until it is ready")
    install.add_argument(
        "--refresh", action="store_true", help="only bring the units to this release; after an upgrade"
    )
    uninstall = _verb(verbs, "uninstall", "remove the service; the data stays", "appliance.install", "uninstall")
    uninstall.add_argument("--purge", action="store_true", help="the data and the configuration, too")
    uninstall.add_argument("--yes", action="store_true", help="with --purge: that is meant")
    for verb in (install, uninstall):
        verb.add_argument(
            "--instance", default="", metavar="NAME", help="a further node of this machine, edgebroker@NAME"
        )
        verb.add_argument("--dry-run", action="store_true", help="only say what would be done")
        verb.add_argument("--root", default="/", metavar="DIR", help="an image that is being built, instead of /")
    upgrade = _verb(
        verbs, "upgrade", "run another release; back by itself when it does not come up", "appliance.upgrade", "upgrade"
    )
    upgrade.add_argument("file", nargs="?", help="the program of that release")
    upgrade.add_argument("--sha256", default="", metavar="HEX", help="its digest, as published")
    upgrade.add_argument("--undo", action="store_true", help="back to the release before this one")
    upgrade.add_argument("--resume", action="store_true", help="only finish an upgrade that was interrupted")
    upgrade.add_argument("--accept-format", action="store_true", help="also when there is no way back but a restore")
    upgrade.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="for each node to be ready (default 60)"
    )
    upgrade.add_argument("--dry-run", action="store_true", help="only say what would be done")


def _status(verbs) -> None:  # type: ignore[no-untyped-def]
    _admin(_verb(verbs, "status", "how a node is, on one screen", "commands.status", "status"))
    check = _family(verbs, "check", "for monitoring: one line, and 0 ok, 1 warning, 2 critical, 3 unknown")
    live = _verb(check, "live", "does it answer?", "commands.status", "live")
    ready = _verb(
        check, "ready", "can it take and deliver records? a missing parent is a warning", "commands.status", "ready"
    )
    for verb in (live, ready):
        verb.add_argument("--healthcheck", action="store_true", help="exit 0 or 1, as container engines expect")
    lag = _verb(check, "lag", "how far behind are the groups?", "commands.status", "lag")
    lag.add_argument("--group", default="", help="only this group; without it all of them")
    lag.add_argument("--records", action="store_true", help="count records, not seconds")
    lag.add_argument("--warning", type=float, default=60.0, metavar="N", help="warning from here on (default 60)")
    lag.add_argument("--critical", type=float, default=600.0, metavar="N", help="critical from here on (default 600)")
    for verb in (live, ready, lag):
        _admin(verb, json=False)
    bundle = _verb(
        verbs,
        "support-bundle",
        "collect what support needs, without records and secrets",
        "appliance.bundle",
        "support_bundle",
    )
    bundle.add_argument("file", nargs="?", help="where to (default: edgebroker-HOST-TIME.tar.gz)")
    bundle.add_argument("-c", "--config", metavar="FILE", help="its configuration (default: all in /etc/edgebroker)")
    _admin(bundle, json=False)
    completion = _verb(
        verbs, "completion", "print what a shell needs to complete commands", "commands.completion", "completion"
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"))


def _server(parser: Parser) -> None:
    parser.add_argument("--server", default=environment.variable("SERVER", SERVER), metavar="HOST:PORT")


def _admin(parser: Parser, *, json: bool = True) -> None:
    default = environment.variable("ADMIN", "127.0.0.1:7421")
    parser.add_argument("--admin", default=default, metavar="HOST:PORT|unix:PATH", help="admin interface of the broker")
    if json:
        parser.add_argument("--json", action="store_true", help="print JSON")


def _publish(verbs) -> None:  # type: ignore[no-untyped-def]
    publish = _verb(
        verbs, "publish", "publish lines of stdin, or rows of a CSV file as JSON", "commands.publish", "publish"
    )
    publish.add_argument("topic")
    _server(publish)
    publish.add_argument("--key", help="key of every record")
    publish.add_argument("--csv", metavar="FILE", help="publish each row as JSON (.gz is read too)")
    publish.add_argument("--key-column", metavar="C", help="with --csv: the column that is the key")
    publish.add_argument("--line-header", metavar="NAME", help="put the line number into a header of this name")
    publish.add_argument("--rate", type=float, default=0.0, metavar="N", help="records a second; 0: as fast as it goes")
    publish.add_argument("--partition", type=int, default=-1, help="partition; -1: by key, or one after the other")
    publish.add_argument("--ack", choices=("durable", "written", "none"), default="durable")
    publish.add_argument("--compression", choices=("none", "gzip", "lz4", "zstd"), default="none")
    publish.add_argument(
        "--snapshot",
        action="store_true",
        help="write a complete snapshot of a table: its live keys, or with --csv its whole new content (keys that are "
        "not in the file are deleted)",
    )
    publish.add_argument("--client-id", default="", help="name of this producer")
    _admin(publish)
    publish.add_argument("--quiet", action="store_true", help="no progress bar")


def _dlq(verbs) -> None:  # type: ignore[no-untyped-def]
    dlq = _family(verbs, "dlq", "list, show, replay and drop dead letters: records that no attempt could handle")
    _admin(_verb(dlq, "list", "list the topics with dead letters", "commands.dlq", "list_letters"))
    show = _verb(dlq, "show", "print the dead letters of a topic", "commands.dlq", "show")
    replay = _verb(dlq, "replay", "publish dead letters again to their topic, in order", "commands.dlq", "replay")
    replay.add_argument("--to", metavar="HOST:PORT", help="where to publish (default: --server; a mirror refuses)")
    drop = _verb(dlq, "drop", "count dead letters as done", "commands.dlq", "drop")
    for verb in (show, replay, drop):
        verb.add_argument("topic", help="the topic whose records failed, or its dead-letter topic")
        verb.add_argument("--count", type=int, default=0, metavar="N", help="only the first N; 0: all of them")
        _admin(verb)
    for verb in (show, replay):
        _server(verb)
    show.add_argument("--all", action="store_true", help="those that were replayed or dropped, too")


def _consume(verbs) -> None:  # type: ignore[no-untyped-def]
    consume = _verb(verbs, "consume", "print the records of a topic as they come", "commands.consume", "consume")
    consume.add_argument("topic", nargs="+")
    _server(consume)
    consume.add_argument("--group", default="", help="consumer group; without one a fresh group is used")
    consume.add_argument(
        "--from",
        dest="start",
        default="committed",
        metavar="WHERE",
        help="earliest, latest, committed (the default; earliest for a new group), OFFSET, or @TIME (ms since 1970)",
    )
    consume.add_argument("--count", type=int, default=0, metavar="N", help="stop after N records; 0: never")
    consume.add_argument(
        "--timeout", type=float, default=0.0, metavar="S", help="stop with 1 when nothing came for S seconds"
    )
    consume.add_argument("--json", action="store_true", help="offset, key, timestamp and headers too, one JSON a line")


def _repair(verbs) -> None:  # type: ignore[no-untyped-def]
    repair = _verb(
        verbs, "repair", "fetch damaged records again from a node that has them", "commands.repair", "repair"
    )
    repair.add_argument(
        "--from", dest="source", required=True, metavar="HOST:PORT", help="HTTP interface of a parent or a child"
    )
    repair.add_argument("--topic", default="", help="only this topic; without it all of them")
    _admin(repair)


def _verify(verbs) -> None:  # type: ignore[no-untyped-def]
    verify = _verb(verbs, "verify", "compare the logs of two nodes, byte for byte", "commands.verify", "verify")
    verify.add_argument(
        "--against", required=True, metavar="HOST:PORT", help="HTTP interface of the other node, a parent or a child"
    )
    verify.add_argument("--topic", default="", help="only this topic; without it all that both have")
    _admin(verify)


def _promote(verbs) -> None:  # type: ignore[no-untyped-def]
    text = "make a mirror the origin of what it mirrors, when the node that wrote it is lost"
    promote = _verb(verbs, "promote", text, "commands.promote", "promote")
    promote.add_argument("--level", default="root", help="level that the node gets (default root)")
    promote.add_argument("--undo", action="store_true", help="from the next start on the configuration counts again")
    _admin(promote)


def _label(parser: Parser) -> None:
    parser.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="only nodes with this label; region, level and name count as labels; more than once: all of them",
    )


def _tree(verbs) -> None:  # type: ignore[no-untyped-def]
    tree = _verb(
        verbs, "tree", "show the nodes below one: how many, and which are silent or behind", "commands.tree", "tree"
    )
    tree.add_argument("--all", action="store_true", help="every node, not only the worst 20")
    tree.add_argument("--watch", action="store_true", help="again every five seconds, until Ctrl-C")
    _label(tree)
    _admin(tree)
    wait = _verb(
        verbs, "wait", "wait until every terminal has applied a topic up to an offset", "commands.tree", "wait"
    )
    wait.add_argument("--topic", required=True)
    wait.add_argument("--offset", type=int, default=-1, help="up to this next offset; without it: where it ends now")
    wait.add_argument("--partition", type=int, default=-1, help="only this partition (with --offset: 0)")
    wait.add_argument("--group", default="", help="only this group has to have applied it; without it all of a node")
    wait.add_argument("--mirrored", action="store_true", help="it is enough that the node has it")
    wait.add_argument(
        "--timeout", default="30m", metavar="TIME", help="as 90s, 30m, 12h; then exit with 1 (default 30m)"
    )
    _label(wait)
    _admin(wait)


def _node(verbs) -> None:  # type: ignore[no-untyped-def]
    node = _family(verbs, "node", "move nodes between parents, at the node that keeps the registry")
    for name, text in (
        ("pin", "give a node parents of its own"),
        ("unpin", "let the registry choose again"),
        ("drain", "move the children of a node elsewhere"),
        ("undrain", "let a node have children again"),
        ("remove", "forget a node that is silent"),
    ):
        verb = _verb(node, name, text, "commands.tree", name)
        verb.add_argument("name", help="name or uid of the node")
        if name == "pin":
            verb.add_argument("parent", nargs="+", help="names or uids of its parents, the best first")
        _admin(verb)


def _reset(verbs) -> None:  # type: ignore[no-untyped-def]
    reset = _verb(
        verbs, "resync", "load topics afresh from the parent, here or at nodes below", "commands.resync", "resync"
    )
    reset.add_argument("--topic", default="", help="which topic; without it all that a node mirrors")
    reset.add_argument("--group", default="", help="instead: have this consumer group load the topic afresh")
    reset.add_argument("--node", default="", metavar="NAME", help="at this node below, by name or uid")
    reset.add_argument("--region", default="", help="at every node of this region below")
    _label(reset)
    reset.add_argument("--wave", type=int, default=10, metavar="N", help="so many nodes at a time (default 10)")
    reset.add_argument("--in-place", action="store_true", help="without a copy beside the old data, which goes first")
    reset.add_argument("--force", action="store_true", help="also when the parent has less than 90 %% of the records")
    reset.add_argument("--accept", action="store_true", help="also when the parent's log is another one")
    reset.add_argument("--hours", default="", metavar="HH:MM-HH:MM", help="switch only then, by the clock of the node")
    reset.add_argument("--timeout", default="2h", metavar="TIME", help="for each wave, as 30m, 12h (default 2h)")
    reset.add_argument(
        "--id", default="", help="go on with this reset at this node, with other --force, --accept or --hours"
    )
    reset.add_argument("--status", action="store_true", help="only show the resets of this node")
    reset.add_argument("--abort", default="", metavar="ID", help="give one up at this node, before its switch")
    _admin(reset)


def _backup(verbs) -> None:  # type: ignore[no-untyped-def]
    backup = _verb(verbs, "backup", "copy the logs of a running node on this machine", "commands.backup", "backup")
    backup.add_argument("directory", help="a directory that does not exist, best on another disk")
    _admin(backup)
    restore = _verb(verbs, "restore", "make a data directory from a backup", "commands.backup", "restore")
    restore.add_argument("directory", help="what edgebroker backup wrote")
    restore.add_argument("--data-dir", required=True, metavar="DIR", help="a directory that does not exist")
    restore.add_argument(
        "--preload", action="store_true", help="for another node (a new terminal): the logs, not the identity"
    )
    restore.add_argument("--json", action="store_true", help="print JSON")


def _topic(verbs) -> None:  # type: ignore[no-untyped-def]
    topic = _family(verbs, "topic", "create, list, describe, alter, accept and delete topics")
    create = _verb(topic, "create", "create a topic", "commands.topic", "create")
    create.add_argument("name")
    create.add_argument("--partitions", type=int, default=1)
    create.add_argument("--kind", choices=("stream", "table"), default="stream")
    _topic_settings(create)
    _admin(create)
    alter = _verb(topic, "alter", "change settings of a topic", "commands.topic", "alter")
    alter.add_argument("name")
    _topic_settings(alter)
    _admin(alter)
    accept = _verb(topic, "accept", "accept that records are lost here, or that the parent has another log", "commands.topic", "accept")  # fmt: skip  # noqa: E501
    accept.add_argument("name")
    _admin(accept)
    delete = _verb(topic, "delete", "delete a topic here and at every node below, for good", "commands.topic", "delete")
    delete.add_argument("name")
    delete.add_argument("--yes", action="store_true", help="without it nothing is deleted")
    _admin(delete)
    _admin(_verb(topic, "list", "list the topics of a node", "commands.topic", "list_topics"))
    describe = _verb(topic, "describe", "show one topic with its partitions", "commands.topic", "describe")
    describe.add_argument("name")
    _admin(describe)


def _topic_settings(parser: Parser) -> None:
    parser.add_argument("--retention-ms", type=int, help="remove segments sealed longer ago; 0: the node's default")
    parser.add_argument("--retention-bytes", type=int, help="keep this much per partition; 0: the node's default")
    parser.add_argument("--segment-bytes", type=int, help="size at which a segment is sealed; 0: the node's default")
    parser.add_argument("--segment-ms", type=int, help="age at which a segment is sealed; 0: the node's default")
    parser.add_argument("--message-ttl-ms", type=int, help="deliver no record that is older at this node; 0: any age")
    parser.add_argument("--urgent", choices=("true", "false"), help="sync at once, whatever the commit interval")
    parser.add_argument("--on-damage", choices=("wait", "skip"), help="what readers do at damaged records")


def _group(verbs) -> None:  # type: ignore[no-untyped-def]
    group = _family(verbs, "group", "list, describe, reset, refresh and delete consumer groups")
    _admin(_verb(group, "list", "list the groups of a node with their lag", "commands.group", "list_groups"))
    describe = _verb(group, "describe", "show one group: places, lag, members", "commands.group", "describe")
    reset = _verb(
        group, "reset-offsets", "move a group to another place, also while it reads", "commands.group", "reset_offsets"
    )
    refresh = _verb(
        group, "refresh", "have a group load a topic afresh, beside what it has", "commands.group", "refresh"
    )
    delete = _verb(group, "delete", "forget a group and its places", "commands.group", "delete")
    for verb in (describe, reset, refresh, delete):
        verb.add_argument("name")
        _admin(verb)
    for verb in (reset, refresh):
        verb.add_argument("--topic", help="which topic; needed when the group reads more than one")
        verb.add_argument("--partition", type=int, default=-1, help="which partition; -1: all")
    where = reset.add_mutually_exclusive_group(required=True)
    where.add_argument("--to", metavar="WHERE", help="earliest, latest, OFFSET, or @TIME (ms since 1970)")
    where.add_argument("--shift", type=int, metavar="N", help="so many records on, or back (negative)")
    reset.add_argument("--dry-run", action="store_true", help="only print where it would go")


def _log(verbs) -> None:  # type: ignore[no-untyped-def]
    log = _family(verbs, "log", "look into segment files, also of a stopped node")
    for name, text in (
        ("dump", "print the batches (and records) of segment files"),
        ("verify", "check every checksum of segment files"),
    ):
        verb = _verb(log, name, text, "commands.log", name)
        verb.add_argument("path", help="a .log file, a partition directory, or a data directory")
        verb.add_argument("--json", action="store_true", help="print JSON, one object a line")
        if name == "dump":
            verb.add_argument("--records", action="store_true", help="print the records, not only the batches")


def _config(verbs) -> None:  # type: ignore[no-untyped-def]
    config = _family(verbs, "config", "check, show and write configuration files")
    check = _verb(config, "check", "check a configuration file and name every problem", "commands.config", "check")
    check.add_argument("file")
    show = _verb(config, "show", "print the configuration that would be used", "commands.config", "show")
    show.add_argument("-c", "--config", metavar="FILE")
    show.add_argument("--json", action="store_true")
    init = _verb(config, "init", "print a commented configuration file with every key", "commands.config", "init")
    init.add_argument("file", nargs="?", help="write it here instead (never over an existing file)")


def _bench(verbs) -> None:  # type: ignore[no-untyped-def]
    bench = _family(verbs, "bench", "measure a running broker or a disk")
    for name, text in (
        ("produce", "publish as fast as it goes"),
        ("consume", "drain a topic as fast as it goes"),
        ("latency", "time from publishing to the push, at a fixed rate"),
        ("connections", "many connections, one record at a time each"),
        ("fanout", "one producer, many consumers that all get everything"),
    ):
        verb = _verb(bench, name, text, "bench.workloads", name)
        _server(verb)
        verb.add_argument("--json", action="store_true")
        verb.add_argument("--topic", default="bench")
        verb.add_argument("--size", type=int, default=128, help="bytes of a value")
        verb.add_argument("--count", type=int, default=100_000, help="records")
        verb.add_argument("--batch", type=int, default=100, help="records in a batch")
        verb.add_argument("--unacked", type=int, default=10_000, help="unacknowledged records at most")
        verb.add_argument("--ack", choices=("durable", "written", "none"), default="durable")
        verb.add_argument("--client", choices=("c", "python"), default="c", help="the C client or the Python client")
        if name == "latency":
            verb.add_argument("--rate", type=float, default=1000.0, help="records a second")
        if name == "connections":
            verb.add_argument("--connections", type=int, default=64)
        if name == "fanout":
            verb.add_argument("--consumers", type=int, default=100)
            verb.set_defaults(count=20_000)
    everything = _verb(
        bench,
        "all",
        "everything on this very machine, on one page that says what to expect of it",
        "bench.target",
        "bench_all",
    )
    everything.add_argument("directory", nargs="?", default=".", help="on the disk that matters (default: here)")
    everything.add_argument("--report", metavar="FILE", help="write the page here as well; FILE.json: as JSON")
    everything.add_argument("--json", action="store_true")
    disk = _verb(bench, "disk", "what this disk can do: append and sync, sequential writes", "bench.workloads", "disk")
    disk.add_argument("directory", nargs="?", default=".")
    disk.add_argument("--json", action="store_true")
