"""`edgebroker join`: make this node a node of a fleet."""

from __future__ import annotations

import argparse
import json

from edgebroker.cli.admin_client import call
from edgebroker.cli.command import Parser, admin_flag, json_flag
from edgebroker.cli.token_argument import read_token
from edgebroker.common.runtime.clock import SystemClock, sleep

WAIT_SECONDS = 20.0


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=join)
    parser.description = (
        "Make this node a node of a fleet, with a token of its root. Without a connection to the fleet the node joins "
        "as soon as there is one."
    )
    parser.add_argument("token", metavar="TOKEN", help="the token; - reads it from standard input, @FILE from a file")
    admin_flag(parser)
    json_flag(parser)


def join(options: argparse.Namespace) -> int:
    call(options.admin, "POST", "/v1/trust/join", {"token": read_token(options.token)})
    clock, found = SystemClock(), call(options.admin, "GET", "/v1/trust")
    deadline = clock.monotonic() + WAIT_SECONDS
    while not found["node"] and not found["joining"] and clock.monotonic() < deadline:
        sleep(0.1)
        found = call(options.admin, "GET", "/v1/trust")
    if options.json:
        print(json.dumps(found))
    elif found["node"]:
        print(f"this node is {found['node']}")
    else:
        print(f"not joined yet: {found['joining'] or 'no answer'}; the node goes on trying (edgebroker trust status)")
    return 0 if found["node"] else 1
