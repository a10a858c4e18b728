"""`edgebroker fleet`: the fleet that nodes belong to, at its root."""

from __future__ import annotations

import argparse
import json

from edgebroker.cli.admin_client import call
from edgebroker.cli.command import Parser, admin_flag, json_flag, subcommand, subcommands


def arguments(parser: Parser) -> None:
    commands = subcommands(parser)
    init_parser = subcommand(commands, "init", "create a fleet, with this node as its root", init)
    init_parser.add_argument("name", metavar="NAME", help="name of the fleet")
    rotate_parser = subcommand(commands, "rotate", "make another issuing key; pin, tokens and nodes stay", rotate)
    for each in (init_parser, rotate_parser):
        admin_flag(each)
        json_flag(each)


def init(options: argparse.Namespace) -> int:
    call(options.admin, "POST", "/v1/trust/fleet", {"name": options.name})
    found = call(options.admin, "GET", "/v1/trust")
    if options.json:
        print(json.dumps(found))
        return 0
    print(f"the fleet {found['fleet']} is created; its pin is {found['pin']}")
    print("next: edgebroker token create --join --level pos,local --region REGION, and give the token to the machines")
    return 0


def rotate(options: argparse.Namespace) -> int:
    found = call(options.admin, "POST", "/v1/trust/rotate")
    text = f"issuer {found['issuer']} signs from now on; nodes get its certificates as they renew theirs"
    print(json.dumps(found) if options.json else text)
    return 0
