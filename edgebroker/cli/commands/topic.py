"""`edgebroker topic create|list|describe|alter|accept|delete`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.command import Parser, admin_flag, json_flag, subcommand, subcommands
from edgebroker.cli.render import counted, print_table
from edgebroker.cli.totals import byte_count, record_count
from edgebroker.common.errors import ConfigError


def arguments(parser: Parser) -> None:
    commands = subcommands(parser)
    create_parser = subcommand(commands, "create", "create a topic", create)
    list_parser = subcommand(commands, "list", "list the topics of a node", list_topics)
    describe_parser = subcommand(commands, "describe", "show a topic with its settings and partitions", describe)
    alter_parser = subcommand(commands, "alter", "change settings of a topic", alter)
    accept_parser = subcommand(commands, "accept", "accept lost records, or another log at the parent", accept)
    accept_parser.description = (
        "At the origin of a topic: accept that the end of its log is lost, and allow publishing again (problem "
        "history_lost). At a replica: accept the other log that the parent has, and follow it (problem replaced)."
    )
    delete_parser = subcommand(commands, "delete", "delete a topic, here and at every node below", delete)
    for each in (create_parser, describe_parser, alter_parser, accept_parser, delete_parser):
        each.add_argument("name")
    create_parser.add_argument("--partitions", type=int, default=1, metavar="N", help="partitions (default 1)")
    create_parser.add_argument(
        "--kind", choices=("stream", "table"), default="stream", help="a table also has a live value per key"
    )
    delete_parser.add_argument("--yes", action="store_true", help="confirm the deletion")
    for each in (create_parser, alter_parser):
        _settings_flags(each)
    for each in (create_parser, list_parser, describe_parser, alter_parser, accept_parser, delete_parser):
        admin_flag(each)
        json_flag(each)


def _settings_flags(parser: Parser) -> None:
    """Without one of these flags a topic keeps its setting; a new one has the default of the node."""
    parser.add_argument("--retention-ms", type=int, help="remove segments sealed longer ago; 0: the node's default")
    parser.add_argument("--retention-bytes", type=int, help="keep this much per partition; 0: the node's default")
    parser.add_argument("--segment-bytes", type=int, help="size at which a segment is sealed; 0: the node's default")
    parser.add_argument("--segment-ms", type=int, help="age at which a segment is sealed; 0: the node's default")
    parser.add_argument("--message-ttl-ms", type=int, help="do not deliver records older than this; 0: no limit")
    parser.add_argument("--urgent", choices=("true", "false"), help="sync at once, without the commit interval")
    parser.add_argument("--on-damage", choices=("wait", "skip"), help="what consumers do at a corrupt range")


def create(options: argparse.Namespace) -> int:
    body = {"name": options.name, "partitions": options.partitions, "kind": options.kind, **_settings(options)}
    _show(call(options.admin, "POST", "/v1/topics", body), options.json)
    return 0


def alter(options: argparse.Namespace) -> int:
    settings = _settings(options)
    if not settings:
        raise ConfigError("no setting to change; give at least one, for example --retention-ms 86400000")
    _show(call(options.admin, "PATCH", api_path("topics", options.name), settings), options.json)
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
                record_count(topic),
                byte_count(topic),
            )
            for topic in topics
        ],
    )
    return 0


def describe(options: argparse.Namespace) -> int:
    _show(call(options.admin, "GET", api_path("topics", options.name)), options.json)
    return 0


def accept(options: argparse.Namespace) -> int:
    call(options.admin, "POST", api_path("topics", options.name, "accept"))
    print(json.dumps({"topic": options.name}) if options.json else f"{options.name}: accepted")
    return 0


def delete(options: argparse.Namespace) -> int:
    if not options.yes:
        topic = call(options.admin, "GET", api_path("topics", options.name))
        records = record_count(topic)
        raise ConfigError(
            f"this would delete topic {options.name} with {counted(records, 'record')}, here and at every node below, "
            "and cannot be undone; add --yes to confirm"
        )
    call(options.admin, "DELETE", api_path("topics", options.name))
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
    settings = [f"{name}={_setting(value)}" for name, value in topic["settings"].items()]
    print(f"topic {topic['name']}: {' '.join(settings)}")
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


def _setting(value: object) -> str:
    """A setting as its flag takes it: true, 4, wait."""
    return str(value).lower() if isinstance(value, bool) else str(value)
