"""`edgebroker dlq list|show|replay|drop`: what became of records that no attempt could handle.

A dead-letter topic is a log like any other; which letters are done with is the place of the group __dlq. Replaying
publishes a record again to its topic, where every group gets it: handlers must bear to see a record twice.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

from edgebroker.cli.admin_client import call
from edgebroker.cli.commands.consume import as_json
from edgebroker.cli.render import print_table
from edgebroker.client.consumer import Consumer
from edgebroker.client.producer import Producer
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.common.records import Record
from edgebroker.common.types import DEAD_LETTERS

GROUP = "__dlq"
PREFIX = "eb-dlq-"
TIMEOUT_SECONDS = 30.0


def letters(admin: str, topics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each topic that has dead letters: how many wait for somebody, how many are still stored."""
    return [
        {"topic": topic["name"].removesuffix(DEAD_LETTERS), "pending": end - place, "kept": end - start}
        for topic in topics
        if topic["name"].endswith(DEAD_LETTERS)
        for start, place, end in [_range(admin, topic)]
    ]


def list_letters(options: argparse.Namespace) -> int:
    found = letters(options.admin, call(options.admin, "GET", "/v1/topics")["topics"])
    if options.json:
        print(json.dumps(found))
    else:
        print_table(("topic", "pending", "kept"), [(line["topic"], line["pending"], line["kept"]) for line in found])
    return 0


def show(options: argparse.Namespace) -> int:
    for record in _letters(options, every=options.all):
        if options.json:
            sys.stdout.buffer.write(as_json(record))
            continue
        said = _said(record)
        print(
            f"{record.offset}: {said['topic']}/{said['partition']} offset {said['offset']}, group {said['group']}, "
            f"{said['attempts']} attempts: {said['reason']}"
        )
    return 0


def replay(options: argparse.Namespace) -> int:
    done = 0
    source = options.topic.removesuffix(DEAD_LETTERS)
    try:
        with Producer(options.to or options.server, timeout=TIMEOUT_SECONDS) as producer:
            for record in _letters(options):
                headers = [header for header in record.headers if not header[0].startswith(PREFIX)]
                partition = int(_said(record)["partition"])
                sent = producer.send(
                    source, record.value, record.key, headers=headers, partition=partition, timestamp=record.timestamp
                )
                sent.result(TIMEOUT_SECONDS)
                _move(options.admin, source, record.offset + 1)
                done += 1
    finally:
        print(json.dumps({"replayed": done}) if options.json else f"{done} dead letters of {source} replayed")
    return 0


def drop(options: argparse.Namespace) -> int:
    source = options.topic.removesuffix(DEAD_LETTERS)
    _, place, end = _range(options.admin, _topic(options))
    target = min(end, place + options.count) if options.count else end
    if target > place:
        _move(options.admin, source, target)
    dropped = target - place
    print(json.dumps({"dropped": dropped}) if options.json else f"{dropped} dead letters of {source} dropped")
    return 0


def _letters(options: argparse.Namespace, *, every: bool = False) -> Iterator[Record]:
    """The dead letters that are not done with, up to --count of them."""
    topic = _topic(options)
    start, place, end = _range(options.admin, topic)
    begin = start if every else place
    left = options.count or end
    if begin >= end:
        return
    with Consumer(options.server, [topic["name"]], start=begin, timeout=TIMEOUT_SECONDS) as consumer:
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
    raise EdgeBrokerError(f"there are no dead letters of {options.topic} on this node")


def _range(admin: str, topic: Any) -> tuple[int, int, int]:
    """(first kept, first that is not done with, end) of a dead-letter topic."""
    partition = topic["partitions"][0]
    place = -1
    for group in call(admin, "GET", "/v1/groups")["groups"]:
        if group["name"] == GROUP:
            places = [part["committed"] for part in group["partitions"] if part["topic"] == topic["name"]]
            place = max(places, default=-1)
    start, end = partition["log_start"], partition["durable_end"]
    return start, min(end, max(place, start)), end


def _move(admin: str, source: str, offset: int) -> None:
    body = {"topic": source + DEAD_LETTERS, "to": str(offset)}
    call(admin, "POST", f"/v1/groups/{quote(GROUP)}/offsets", body)


def _said(record: Record) -> dict[str, str]:
    """What the broker wrote about a dead letter."""
    said = dict.fromkeys(("topic", "partition", "offset", "group", "attempts", "reason", "time"), "?")
    for name, value in record.headers:
        if name.startswith(PREFIX) and value is not None:
            said[name.removeprefix(PREFIX)] = value.decode(errors="replace")
    return said
