"""`edgebroker topic create|list|describe|alter|accept|rename|delete|undelete`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.command import Parser, admin_flag, json_flag, subcommand, subcommands
from edgebroker.cli.render import counted, date_and_time, print_table
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
    rename_parser = subcommand(commands, "rename", "keep the records of a topic under another name", rename)
    rename_parser.description = (
        "Under another name it is another topic with the same records: the offsets of groups do not come along, and "
        "the nodes below fetch it again. Where the parent has a topic of the old name, that is taken (problem "
        "name_clash)."
    )
    delete_parser = subcommand(commands, "delete", "delete a topic, here and at every node below", delete)
    delete_parser.description = (
        "At the origin of a topic: delete it here and at every node below. At a replica whose parent does not have it: "
        "delete what is here. The files stay for storage.deleted_retention_ms: see undelete."
    )
    undelete_parser = subcommand(commands, "undelete", "take back a deleted topic", undelete)
    undelete_parser.description = (
        "At its origin: the topic comes back with its records, and every node below fetches it again. At a replica: it "
        "is taken from the parent again. `topic list --deleted` shows what can be taken back."
    )
    list_parser.add_argument("--deleted", action="store_true", help="deleted topics that can be taken back")
    named = (create_parser, describe_parser, alter_parser, accept_parser, rename_parser, delete_parser, undelete_parser)
    for each in named:
        each.add_argument("name")
    rename_parser.add_argument("new_name", metavar="new-name")
    undelete_parser.add_argument(
        "--as",
        dest="new_name",
        metavar="NAME",
        default="",
        help="as another topic, written at this node",
    )
    create_parser.add_argument("--partitions", type=int, default=1, metavar="N", help="partitions (default 1)")
    create_parser.add_argument(
        "--kind", choices=("stream", "table"), default="stream", help="a table also has a live value per key"
    )
    delete_parser.add_argument("--yes", action="store_true", help="confirm the deletion")
    rename_parser.add_argument("--yes", action="store_true", help="confirm the new name")
    for each in (create_parser, alter_parser):
        _settings_flags(each)
    for each in (*named, list_parser):
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
    parser.add_argument(
        "--max-delete-percent", type=int, help="share of the keys that a snapshot may delete (default 1)"
    )
    parser.add_argument("--hold-ms", type=int, help="a silent group or child holds so long; 0: the node's default")
    parser.add_argument("--hold-bytes", type=int, help="a silent one holds so much; 0: the node's default")
    parser.add_argument(
        "--replicas", type=int, help="nodes below that must have what is published with --ack replicated"
    )
    parser.add_argument("--replica-nodes", metavar="NAMES", help="only these count, by name, with commas; '' for any")
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
    if options.deleted:
        _list_deleted(options)
        return 0
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
    _tell(options, "accepted")
    return 0


def _list_deleted(options: argparse.Namespace) -> None:
    found = call(options.admin, "GET", "/v1/deleted-topics")
    if options.json:
        print(json.dumps(found))
        return
    print_table(
        ("topic", "bytes", "deleted"),
        [(one["topic"], one["bytes"], date_and_time(one["deleted_ms"])) for one in found["topics"]],
    )
    if found["refused"]:
        print(f"not taken from a parent any more: {', '.join(found['refused'])}")


def rename(options: argparse.Namespace) -> int:
    if not options.yes:
        raise ConfigError(
            f"this would make topic {options.name} with {_records(options)} a topic {options.new_name}, here and at "
            "every node below; offsets of groups do not come along; add --yes to confirm"
        )
    call(options.admin, "POST", api_path("topics", options.name, "rename"), {"name": options.new_name})
    _tell(options, f"renamed to {options.new_name}")
    return 0


def delete(options: argparse.Namespace) -> int:
    if not options.yes:
        raise ConfigError(
            f"this would delete topic {options.name} with {_records(options)}, here and at every node below; its files "
            "stay for a while (edgebroker topic undelete); add --yes to confirm"
        )
    call(options.admin, "DELETE", api_path("topics", options.name))
    _tell(options, "deleted")
    return 0


def undelete(options: argparse.Namespace) -> int:
    call(options.admin, "POST", api_path("deleted-topics", options.name, "undelete"), {"name": options.new_name})
    _tell(options, f"taken back as {options.new_name}" if options.new_name else "taken back")
    return 0


def _records(options: argparse.Namespace) -> str:
    return counted(record_count(call(options.admin, "GET", api_path("topics", options.name))), "record")


def _tell(options: argparse.Namespace, what: str) -> None:
    print(json.dumps({"topic": options.name}) if options.json else f"{options.name}: {what}")


def _settings(options: argparse.Namespace) -> dict[str, object]:
    given: dict[str, object] = {}
    for name in (
        "retention_ms",
        "retention_bytes",
        "segment_bytes",
        "segment_ms",
        "message_ttl_ms",
        "max_delete_percent",
        "hold_ms",
        "hold_bytes",
        "replicas",
        "replica_nodes",
        "on_damage",
    ):
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
        ("partition", "log_start", "durable_end", "segments", "bytes", "epoch", "damaged", "gaps"),
        [
            (
                part["partition"],
                part["log_start"],
                part["durable_end"],
                part.get("segments", "-"),
                part["bytes"],
                part["epoch"],
                *(_spans(part.get(what, [])) for what in ("damaged", "gaps")),
            )
            for part in topic["partitions"]
        ],
    )


def _spans(ranges: list[dict[str, int]]) -> str:
    return " ".join(f"{one['first']}-{one['last']}" for one in ranges) or "-"


def _setting(value: object) -> str:
    """A setting as its flag takes it: true, 4, wait."""
    return str(value).lower() if isinstance(value, bool) else str(value)
