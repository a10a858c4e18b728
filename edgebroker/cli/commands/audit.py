"""`edgebroker audit`: who changed what at this node, and who was refused."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import UTC, datetime

from edgebroker.cli.admin_client import call
from edgebroker.cli.command import Parser, admin_flag, json_flag, server_flag
from edgebroker.client.consumer import Consumer
from edgebroker.common.names import AUDIT_TOPIC, printable
from edgebroker.common.records import Record

TIMEOUT_SECONDS = 30.0


def arguments(parser: Parser) -> None:
    parser.add_argument("--follow", action="store_true", help="go on with what comes, until Ctrl-C")
    server_flag(parser)
    admin_flag(parser)
    json_flag(parser)
    parser.set_defaults(run=audit)


def audit(options: argparse.Namespace) -> int:
    end = _end(options.admin)
    if not end and not options.follow:
        print("nothing is recorded at this node yet", file=sys.stderr)
        return 0
    timeout = None if options.follow else TIMEOUT_SECONDS
    with Consumer(options.server, [AUDIT_TOPIC], start="earliest", timeout=timeout) as consumer:
        for record in consumer:
            print(_line(record, json_wanted=options.json), flush=options.follow)
            if not options.follow and record.offset + 1 >= end:
                break
    return 0


def _end(admin: str) -> int:
    """Up to where there are records; 0: none yet."""
    topics = call(admin, "GET", "/v1/topics")["topics"]
    ends = [topic["partitions"][0]["durable_end"] for topic in topics if topic["name"] == AUDIT_TOPIC]
    return int(ends[0]) if ends else 0


def _line(record: Record, *, json_wanted: bool) -> str:
    text = (record.value or b"").decode(errors="replace")
    if json_wanted:
        return printable(text)
    said = json.loads(text)
    when = datetime.fromtimestamp(said["time"] / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
    who = f"{said['principal'] or '(unknown)'} ({said['address']})"
    return printable(f"{when}  {who}  {said['action']} {said['object']}  {said['result']}")
