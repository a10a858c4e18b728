"""`edgebroker dlq list|show|replay|drop`: the records that failed too often.

A dead-letter topic is an ordinary topic. The committed offset of the group __dlq says which dead letters have been
replayed or dropped. A replay publishes a record to its topic again, where every group receives it: handlers must
tolerate a record that they have seen.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.command import (
    Parser,
    admin_flag,
    at_least,
    credentials_flag,
    json_flag,
    server_flag,
    subcommand,
    subcommands,
)
from edgebroker.cli.commands.consume import as_json
from edgebroker.cli.render import counted, print_table
from edgebroker.cli.totals import DLQ_GROUP, dead_letter_counts, dead_letter_range
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.common.names import printable
from edgebroker.common.records import Record
from edgebroker.common.types import DEAD_LETTERS

PREFIX = "eb-dlq-"
TIMEOUT_SECONDS = 30.0


def arguments(parser: Parser) -> None:
    parser.description = (
        "Handle dead letters: records that consumers rejected or did not acknowledge too often. They are stored in the "
        f"topic TOPIC{DEAD_LETTERS}."
    )
    commands = subcommands(parser)
    list_parser = subcommand(commands, "list", "list the topics that have dead letters", list_dead_letters)
    show_parser = subcommand(commands, "show", "print the pending dead letters of a topic", show)
    replay_parser = subcommand(commands, "replay", "publish pending dead letters to their topic again", replay)
    drop_parser = subcommand(commands, "drop", "mark pending dead letters as handled", drop)
    for each in (show_parser, replay_parser, drop_parser):
        each.add_argument("topic", help="the topic whose records failed, or its dead-letter topic")
        each.add_argument("--count", type=at_least(0), default=0, metavar="N", help="only the first N (default 0: all)")
    for each in (show_parser, replay_parser):
        server_flag(each)
        credentials_flag(each)
    show_parser.add_argument("--all", action="store_true", help="also those that were replayed or dropped")
    replay_parser.add_argument(
        "--to", metavar="HOST:PORT", help="broker to publish to, for example the origin (default: that of --server)"
    )
    for each in (list_parser, show_parser, replay_parser, drop_parser):
        admin_flag(each)
        json_flag(each)


def list_dead_letters(options: argparse.Namespace) -> int:
    found = dead_letter_counts(call(options.admin, "GET", "/v1/topics")["topics"], _groups(options))
    if options.json:
        print(json.dumps(found))
    else:
        print_table(("topic", "pending", "kept"), [(line["topic"], line["pending"], line["kept"]) for line in found])
    return 0


def show(options: argparse.Namespace) -> int:
    for record in _dead_letters(options, every=options.all):
        if options.json:
            sys.stdout.buffer.write(as_json(record))
            continue
        source = _source(record)
        print(
            printable(
                f"{record.offset}: {source['topic']}/{source['partition']} offset {source['offset']}, group "
                f"{source['group']}, {source['attempts']} attempts: {source['reason']}"
            )
        )
    return 0


def replay(options: argparse.Namespace) -> int:
    done = 0
    source = options.topic.removesuffix(DEAD_LETTERS)
    try:
        with Producer(
            options.to or options.server, credentials=options.credentials, timeout=TIMEOUT_SECONDS
        ) as producer:
            for record in _dead_letters(options):
                headers = [header for header in record.headers if not header[0].startswith(PREFIX)]
                partition = int(_source(record)["partition"])
                sent = producer.send(
                    source, record.value, record.key, headers=headers, partition=partition, timestamp=record.timestamp
                )
                sent.result(TIMEOUT_SECONDS)
                _commit(options.admin, source, record.offset + 1)
                done += 1
    finally:
        text = f"{counted(done, 'dead letter')} of {source} replayed"
        print(json.dumps({"replayed": done}) if options.json else text)
    return 0


def drop(options: argparse.Namespace) -> int:
    source = options.topic.removesuffix(DEAD_LETTERS)
    _, committed, end = dead_letter_range(_topic(options), _groups(options))
    target = min(end, committed + options.count) if options.count else end
    if target > committed:
        _commit(options.admin, source, target)
    dropped = target - committed
    text = f"{counted(dropped, 'dead letter')} of {source} dropped"
    print(json.dumps({"dropped": dropped}) if options.json else text)
    return 0


def _dead_letters(options: argparse.Namespace, *, every: bool = False) -> Iterator[Record]:
    """The pending dead letters, or all that are stored, up to --count of them."""
    topic = _topic(options)
    start, committed, end = dead_letter_range(topic, _groups(options))
    begin = start if every else committed
    left = options.count or end
    if begin >= end:
        return
    with Consumer(
        options.server,
        [topic["name"]],
        credentials=options.credentials,
        start=begin,
        missing_topic="raise",
        timeout=TIMEOUT_SECONDS,
    ) as consumer:
        for record in consumer:
            yield record
            left -= 1
            if record.offset + 1 >= end or left == 0:
                return


def _topic(options: argparse.Namespace) -> Any:
    name = options.topic.removesuffix(DEAD_LETTERS) + DEAD_LETTERS
    for topic in call(options.admin, "GET", "/v1/topics")["topics"]:
        if topic["name"] == name:
            return topic
    raise EdgeBrokerError(f"topic {options.topic} has no dead letters on this node; see edgebroker dlq list")


def _groups(options: argparse.Namespace) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = call(options.admin, "GET", "/v1/groups")["groups"]
    return found


def _commit(admin: str, source: str, offset: int) -> None:
    body = {"topic": source + DEAD_LETTERS, "to": str(offset)}
    call(admin, "POST", api_path("groups", DLQ_GROUP, "offsets"), body)


def _source(record: Record) -> dict[str, str]:
    """Where a dead letter is from and why it failed, as the broker noted in its headers."""
    found = dict.fromkeys(("topic", "partition", "offset", "group", "attempts", "reason", "time"), "?")
    for name, value in record.headers:
        if name.startswith(PREFIX) and value is not None:
            found[name.removeprefix(PREFIX)] = value.decode(errors="replace")
    return found
