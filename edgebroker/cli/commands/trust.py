"""`edgebroker trust`: this node's place in its fleet."""

from __future__ import annotations

import argparse
import json
from datetime import UTC, datetime

from edgebroker.cli.admin_client import call
from edgebroker.cli.command import Parser, admin_flag, json_flag, subcommand, subcommands


def arguments(parser: Parser) -> None:
    commands = subcommands(parser)
    status_parser = subcommand(commands, "status", "show this node's certificate, its fleet and its clock", status)
    admin_flag(status_parser)
    json_flag(status_parser)


def status(options: argparse.Namespace) -> int:
    found = call(options.admin, "GET", "/v1/trust")
    if options.json:
        print(json.dumps(found))
        return 0
    if not found["node"]:
        why = found["problem"] or found["joining"] or "it was given no token (edgebroker join TOKEN)"
        print(f"this node belongs to no fleet: {why}")
        return 0
    print(f"fleet:        {found['fleet']} (pin {found['pin']})")
    print(f"this node:    {found['node']}")
    print(f"certificate:  until {_day(found['expires_ms'])}, by issuer {found['issuer']}; it renews itself")
    print(f"clock:        {found['clock']}")
    if found["issues"]:
        print("issues:       certificates are issued here")
    if found["root_key_here"]:
        print("root key:     is here; take it away (edgebroker fleet export-key FILE)")
    if found["problem"]:
        print(f"problem:      {found['problem']}")
    if found["joining"]:
        print(f"renewal:      {found['joining']}")
    return 0


def _day(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%d")
