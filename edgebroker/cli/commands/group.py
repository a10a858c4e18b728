"""`edgebroker group list|describe|reset-offsets|refresh|delete`."""

from __future__ import annotations

import argparse
import json

from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.command import Parser, admin_flag, json_flag, subcommand, subcommands
from edgebroker.cli.render import print_table
from edgebroker.cli.totals import group_lag
from edgebroker.common.errors import ConfigError


def arguments(parser: Parser) -> None:
    commands = subcommands(parser)
    list_parser = subcommand(commands, "list", "list the groups of a node with their lag", list_groups)
    describe_parser = subcommand(commands, "describe", "show a group: committed offsets, lag, members", describe)
    reset_parser = subcommand(commands, "reset-offsets", "move the committed offsets of a group", reset_offsets)
    reset_parser.description = "Move the committed offsets of a group. Its members continue from there at once."
    refresh_parser = subcommand(commands, "refresh", "start a snapshot refresh of a topic in a group", refresh)
    refresh_parser.description = (
        "Start a snapshot refresh: the consumers of the group load a topic again, beside the data that they have, and "
        "switch in one step."
    )
    delete_parser = subcommand(commands, "delete", "delete a group and its committed offsets", delete)
    for each in (describe_parser, reset_parser, refresh_parser, delete_parser):
        each.add_argument("name")
    for each in (reset_parser, refresh_parser):
        each.add_argument("--topic", help="topic; required when the group reads more than one")
        each.add_argument("--partition", type=int, default=-1, metavar="N", help="partition (default -1: all)")
    target = reset_parser.add_mutually_exclusive_group(required=True)
    target.add_argument(
        "--to", metavar="WHERE", help="earliest, latest, an OFFSET, or @TIME in milliseconds since 1970"
    )
    target.add_argument("--shift", type=int, metavar="N", help="N records forward, or back when negative")
    reset_parser.add_argument("--dry-run", action="store_true", help="print the new offsets, and change nothing")
    for each in (list_parser, describe_parser, reset_parser, refresh_parser, delete_parser):
        admin_flag(each)
        json_flag(each)


def list_groups(options: argparse.Namespace) -> int:
    groups = call(options.admin, "GET", "/v1/groups")["groups"]
    if options.json:
        print(json.dumps(groups))
        return 0
    print_table(
        ("group", "partitions", "members", "lag"),
        [
            (
                group["name"],
                len(group["partitions"]),
                len(group["members"]),
                group_lag(group)[0],
            )
            for group in groups
        ],
    )
    return 0


def describe(options: argparse.Namespace) -> int:
    group = call(options.admin, "GET", api_path("groups", options.name))
    if options.json:
        print(json.dumps(group))
        return 0
    print(f"group {group['name']}, generation {group['generation']}")
    print_table(
        ("topic", "partition", "committed", "durable_end", "lag", "in_flight", "attempts", "state", "member"),
        [
            (
                part["topic"],
                part["partition"],
                part["committed"],
                part["durable_end"],
                part["lag"],
                part["member"]["in_flight"] if part["member"] else "-",
                part["attempts"],
                part["member"]["state"] if part["member"] else "-",
                part["member"]["client_id"] if part["member"] else "-",
            )
            for part in group["partitions"]
        ],
    )
    for part in group["partitions"]:
        where = f"{part['topic']}/{part['partition']}"
        if part["member"] and part["member"]["why"]:
            print(f"{where}: {part['member']['why']}")
        if 0 <= part["applied"] < part["committed"]:
            print(f"{where}: stored up to {part['committed']}, applied up to {part['applied']}")
        if part["refresh"] and part["refresh"]["state"] == "refreshing":
            refresh = part["refresh"]
            print(f"{where}: refresh {refresh['reset_id']} from {refresh['from']} to {refresh['target']}")
    return 0


def reset_offsets(options: argparse.Namespace) -> int:
    body: dict[str, object] = {"topic": _topic(options), "partition": options.partition, "dry_run": options.dry_run}
    body.update({"to": options.to} if options.to is not None else {"shift": options.shift})
    answer = call(options.admin, "POST", api_path("groups", options.name, "offsets"), body)
    if options.json:
        print(json.dumps(answer))
        return 0
    print_table(
        ("topic", "partition", "from", "to"),
        [
            (move["topic"], move["partition"], move["from"] if move["from"] >= 0 else "-", move["to"])
            for move in answer["partitions"]
        ],
    )
    if answer["dry_run"]:
        print("dry run: nothing was changed")
    return 0


def refresh(options: argparse.Namespace) -> int:
    body = {"topic": _topic(options), "partition": options.partition}
    group = call(options.admin, "POST", api_path("groups", options.name, "refresh"), body)
    if options.json:
        print(json.dumps(group))
        return 0
    for part in group["partitions"]:
        if part["refresh"] and part["topic"] == body["topic"] and options.partition in (-1, part["partition"]):
            state, where = part["refresh"], f"{part['topic']}/{part['partition']}"
            print(f"{where}: refresh {state['reset_id']} from {state['from']} to {state['target']}")
    return 0


def delete(options: argparse.Namespace) -> int:
    call(options.admin, "DELETE", api_path("groups", options.name))
    print(json.dumps({"deleted": options.name}) if options.json else f"group {options.name} deleted")
    return 0


def _topic(options: argparse.Namespace) -> str:
    """The topic of --topic, or the only one that the group reads."""
    if options.topic:
        return str(options.topic)
    group = call(options.admin, "GET", api_path("groups", options.name))
    topics = sorted({part["topic"] for part in group["partitions"]})
    if len(topics) != 1:
        read = f"reads {', '.join(topics)}" if topics else "has not read a topic yet"
        raise ConfigError(f"group {options.name} {read}; name the topic with --topic")
    return str(topics[0])
