"""Sums over what the admin interface answers: records, lag, dead letters."""

from __future__ import annotations

from typing import Any

from edgebroker.common.types import DEAD_LETTERS

DLQ_GROUP = "__dlq"
"""The group whose committed offset says which dead letters were replayed or dropped."""


def record_count(topic: dict[str, Any]) -> int:
    """The records that a topic holds."""
    return sum(part["durable_end"] - part["log_start"] - _missing(part) for part in topic["partitions"])


def _missing(partition: dict[str, Any]) -> int:
    """How many offsets of a partition lie in its gaps."""
    return sum(int(gap["last"]) + 1 - int(gap["first"]) for gap in partition["gaps"])


def byte_count(topic: dict[str, Any]) -> int:
    """The bytes that a topic takes."""
    return sum(part["bytes"] for part in topic["partitions"])


def group_lag(group: dict[str, Any]) -> tuple[int, float]:
    """The lag of a group in records, and the seconds of its partition that is furthest behind."""
    parts = group["partitions"]
    return (
        sum(max(0, part["lag"]) for part in parts),
        max((part["lag_seconds"] for part in parts), default=0.0),
    )


def dead_letter_range(topic: dict[str, Any], groups: list[dict[str, Any]]) -> tuple[int, int, int]:
    """The first stored offset of a dead-letter topic, the committed one, and the next one."""
    partition = topic["partitions"][0]
    committed = -1
    for group in groups:
        if group["name"] == DLQ_GROUP:
            offsets = [part["committed"] for part in group["partitions"] if part["topic"] == topic["name"]]
            committed = max(offsets, default=-1)
    start, end = partition["log_start"], partition["durable_end"]
    return start, min(end, max(committed, start)), end


def dead_letter_counts(topics: list[dict[str, Any]], groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each topic with dead letters: how many are pending, and how many are stored."""
    return [
        {"topic": topic["name"].removesuffix(DEAD_LETTERS), "pending": end - committed, "kept": end - start}
        for topic in topics
        if topic["name"].endswith(DEAD_LETTERS)
        for start, committed, end in [dead_letter_range(topic, groups)]
    ]
