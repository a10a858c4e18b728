"""`edgebroker promote`: make a replica the origin of its topics."""

from __future__ import annotations

import argparse
import json

from edgebroker.cli.admin_client import call
from edgebroker.cli.command import Parser, admin_flag, json_flag
from edgebroker.cli.render import counted, duration
from edgebroker.common.errors import ConfigError
from edgebroker.common.levels import LEVELS


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
    return (
        f"this would make this node the origin of {counted(len(topics), 'topic')} at level {options.level}. The parent "
        f"{parent['name'] or parent['address']} {state}{since}; {lost}"
    )
