"""`edgebroker topic create|list|describe|alter|accept`."""

from __future__ import annotations

import argparse
import json
from typing import Any
from urllib.parse import quote

from edgebroker.cli.admin_client import call
from edgebroker.cli.render import print_table
from edgebroker.common.errors import ConfigError


def create(options: argparse.Namespace) -> int:
    body = {"name": options.name, "partitions": options.partitions, "kind": options.kind, **_settings(options)}
    _show(call(options.admin, "POST", "/v1/topics", body), options.json)
    return 0


def alter(options: argparse.Namespace) -> int:
    settings = _settings(options)
    if not settings:
        raise ConfigError("name at least one setting to change, for example --retention-ms 86400000")
    _show(call(options.admin, "PATCH", f"/v1/topics/{quote(options.name)}", settings), options.json)
    return 0


def list_topics(options: argparse.Namespace) -> int:
    topics = call(options.admin, "GET", "/v1/topics")["topics"]
    if options.json:
        print(json.dumps(topics))
        return 0
    print_table(
        ("topic", "kind", "partitions", "records", "bytes"),
        [
            (
                topic["name"],
                topic["settings"]["kind"],
                len(topic["partitions"]),
                sum(part["durable_end"] - part["log_start"] for part in topic["partitions"]),
                sum(part["bytes"] for part in topic["partitions"]),
            )
            for topic in topics
        ],
    )
    return 0


def describe(options: argparse.Namespace) -> int:
    _show(call(options.admin, "GET", f"/v1/topics/{quote(options.name)}"), options.json)
    return 0


def accept(options: argparse.Namespace) -> int:
    call(options.admin, "POST", f"/v1/topics/{quote(options.name)}/accept")
    print(json.dumps({"topic": options.name}) if options.json else f"{options.name}: accepted")
    return 0


def delete(options: argparse.Namespace) -> int:
    if not options.yes:
        topic = call(options.admin, "GET", f"/v1/topics/{quote(options.name)}")
        records = sum(part["durable_end"] - part["log_start"] for part in topic["partitions"])
        raise ConfigError(
            f"this deletes {options.name} with its {records} records, here and at every node below, for good; say --yes"
        )
    call(options.admin, "DELETE", f"/v1/topics/{quote(options.name)}")
    print(json.dumps({"topic": options.name}) if options.json else f"{options.name}: deleted")
    return 0


def _settings(options: argparse.Namespace) -> dict[str, object]:
    given: dict[str, object] = {}
    for name in ("retention_ms", "retention_bytes", "segment_bytes", "segment_ms", "message_ttl_ms", "on_damage"):
        if getattr(options, name) is not None:
            given[name] = getattr(options, name)
    if options.urgent is not None:
        given["urgent"] = options.urgent == "true"
    return given


def _show(topic: dict[str, Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps(topic))
        return
    print(f"topic {topic['name']}: " + ", ".join(f"{name} {value}" for name, value in topic["settings"].items()))
    print_table(
        ("partition", "log_start", "durable_end", "segments", "bytes", "epoch", "damaged"),
        [
            (
                part["partition"],
                part["log_start"],
                part["durable_end"],
                part.get("segments", "-"),
                part["bytes"],
                part["epoch"],
                " ".join(f"{corrupt['first']}-{corrupt['last']}" for corrupt in part.get("damaged", [])) or "-",
            )
            for part in topic["partitions"]
        ],
    )
