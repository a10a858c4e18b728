"""`edgebroker promote`: make a replica the origin of its topics."""

from __future__ import annotations

import argparse
import json

from edgebroker.cli.admin_client import api_path, call
from edgebroker.cli.command import Parser, admin_flag, json_flag
from edgebroker.cli.render import counted, duration
from edgebroker.common.errors import ConfigError, EdgeBrokerError
from edgebroker.common.levels import LEVELS

MOST_COMPARED = 20


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=promote)
    parser.description = (
        "Make a node the origin of the topics that it replicates, when the node that wrote them is lost. Records that "
        "had not reached this node are lost with it. Without --yes the command only shows what it would do."
    )
    parser.add_argument("--level", choices=LEVELS[:-1], default="root", help="level that the node takes (default root)")
    parser.add_argument("--yes", action="store_true", help="confirm the promotion")
    parser.add_argument("--undo", action="store_true", help="follow the configuration again from the next start on")
    admin_flag(parser)
    json_flag(parser)


def promote(options: argparse.Namespace) -> int:
    if options.undo:
        call(options.admin, "DELETE", "/v1/promote")
        text = "promotion removed: the node follows its configuration from its next start on"
    else:
        if not options.yes:
            raise ConfigError(f"{_what(options)}; add --yes to confirm")
        call(options.admin, "POST", "/v1/promote", {"level": options.level})
        text = f"this node is now the origin of the topics that it replicated, at level {options.level}"
    print(json.dumps({"level": None if options.undo else options.level}) if options.json else text)
    return 0


def _what(options: argparse.Namespace) -> str:
    """What a promotion would do, and what is known to be lost with it."""
    parent = call(options.admin, "GET", "/v1/pipe")["parent"]
    if parent is None:
        return f"this would make this node, which has no parent, a node of level {options.level}"
    topics = {log["topic"] for log in parent["logs"]}
    lag = sum(log["lag"] or 0 for log in parent["logs"])
    heard = parent["heard_seconds_ago"]
    state = "is CONNECTED: it is not lost" if parent["connected"] else "is not connected"
    since = f", last contact {duration(heard)} ago" if heard is not None else ", no contact yet"
    lost = f"{counted(lag, 'record')} that it had are not here and would be lost" if lag else "no lag was known then"
    found = [
        f"this would make this node the origin of {counted(len(topics), 'topic')} at level {options.level}. The parent "
        f"{parent['name'] or parent['address']} {state}{since}; {lost}"
    ]
    standby = call(options.admin, "GET", "/v1/registry/standby")
    if standby["root"]:
        found.append("A copy of the registry is here; it is kept here from then on")
        admin = options.admin
        uid, mine = call(admin, "GET", "/v1/node")["uid"], _ends(admin, "/v1/topics")
        found += [_compared(admin, hub, mine) for hub in standby["hubs"] if hub["uid"] != uid][:MOST_COMPARED]
    else:
        found.append("No copy of the registry is here: pins and drains are lost, and other hubs do not follow by it")
    return ". ".join(found)


def _ends(admin: str, path: str) -> dict[tuple[str, str, int], int]:
    """Up to where a node has each log, by its answer to a path."""
    return {
        (topic["name"], log["log_id"], log["partition"]): log["durable_end"]
        for topic in call(admin, "GET", path)["topics"]
        for log in topic["partitions"]
    }


def _compared(admin: str, hub: dict[str, str], mine: dict[tuple[str, str, int], int]) -> str:
    """What another hub that followed the same parent has, compared with this node."""
    try:
        theirs = _ends(admin, api_path("peers", hub["address"], "topics"))
    except EdgeBrokerError:
        return f"{hub['name']} at {hub['address']} does not answer: what it has is not known"
    more = sum(max(0, end - mine[log]) for log, end in theirs.items() if log in mine)
    if more:
        return f"{hub['name']} has {counted(more, 'record')} MORE, which would be lost: promote that node instead"
    return f"{hub['name']} has nothing that is not here"
