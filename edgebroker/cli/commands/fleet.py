"""`edgebroker fleet`: the fleet that nodes belong to, at its root."""

from __future__ import annotations

import argparse
import getpass
import json
import sys
from pathlib import Path

from edgebroker.cli.admin_client import call
from edgebroker.cli.command import Parser, admin_flag, json_flag, subcommand, subcommands
from edgebroker.cli.render import print_table
from edgebroker.common.errors import EdgeBrokerError
from edgebroker.common.names import printable
from edgebroker.trust.directory import TrustDirectory

SHORTEST_PASSPHRASE = 12


def arguments(parser: Parser) -> None:
    commands = subcommands(parser)
    init_parser = subcommand(commands, "init", "create a fleet, with this node as its root", init)
    init_parser.add_argument("name", metavar="NAME", help="name of the fleet")
    show_parser = subcommand(commands, "show", "show how many nodes have joined, and which wait for approval", show)
    rotate_parser = subcommand(commands, "rotate", "make another issuing key; pin, tokens and nodes stay", rotate)
    rotate_parser.add_argument("--root-key", metavar="FILE", help="the file that export-key made of the root key")
    rotate_parser.add_argument(
        "--retire", action="store_true", help="do not believe the keys before it any more: one may have been stolen"
    )
    export_parser = subcommand(
        commands, "export-key", "take the root key away from this machine, into a file with a passphrase", export_key
    )
    export_parser.add_argument("file", metavar="FILE", help="a new file, on a medium that you keep offline")
    for each in (init_parser, show_parser, rotate_parser, export_parser):
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


def show(options: argparse.Namespace) -> int:
    status = call(options.admin, "GET", "/v1/trust")
    found = call(options.admin, "GET", "/v1/trust/fleet")
    if options.json:
        print(json.dumps({"fleet": status["fleet"], "pin": status["pin"], "issuer": status["issuer"], **found}))
        return 0
    print(f"fleet:    {status['fleet']} (pin {status['pin']}), issuer {status['issuer']}")
    waits = f", {found['held']} wait for approval (edgebroker node approve)" if found["held"] else ""
    print(f"nodes:    {found['joined']} joined{waits}, {found['revoked']} revoked")
    for one in found["labels"]:
        print(f"tokens:   {printable(one['label']) or '(no label)'}: {one['joined']} of {one['uses']} have joined")
    if found["waiting"]:
        print_table(
            ("waiting", "level", "region", "uid"),
            [(one["name"], one["level"], one["region"] or "(all)", one["uid"]) for one in found["waiting"]],
        )
    return 0


def rotate(options: argparse.Namespace) -> int:
    from edgebroker.trust.issuing import import_root_key  # cryptography takes a while to import

    directory = _directory(options.admin)
    imported = options.root_key is not None and not directory.root_key.exists()
    if imported:
        import_root_key(directory, Path(options.root_key), _passphrase("passphrase of the root key: "))
    try:
        found = call(options.admin, "POST", "/v1/trust/rotate", {"retire": options.retire})
    finally:
        if imported:
            directory.forget_root_key()
    when = "now; until then they are not let in" if options.retire else "as they renew theirs"
    text = f"issuer {found['issuer']} signs from now on; nodes get its certificates {when}"
    print(json.dumps(found) if options.json else text)
    return 0


def export_key(options: argparse.Namespace) -> int:
    from edgebroker.trust.issuing import export_root_key

    directory, target = _directory(options.admin), Path(options.file)
    passphrase = _passphrase("new passphrase: ")
    if len(passphrase) < SHORTEST_PASSPHRASE:
        raise EdgeBrokerError(f"the passphrase is too short: use {SHORTEST_PASSPHRASE} characters or more")
    if sys.stdin.isatty() and _passphrase("once more: ") != passphrase:
        raise EdgeBrokerError("the passphrases differ; the root key is where it was")
    export_root_key(directory, target, passphrase)
    text = f"the root key is in {target} now, and not on this node; keep two copies offline, and the passphrase apart"
    print(json.dumps({"file": str(target.absolute())}) if options.json else text)
    return 0


def _directory(admin: str) -> TrustDirectory:
    """The files of the node that answers. Raises EdgeBrokerError when they are not here, or not to be read."""
    found = call(admin, "GET", "/v1/trust")
    if not found["node"]:
        raise EdgeBrokerError("this node belongs to no fleet; create one with edgebroker fleet init NAME")
    directory = TrustDirectory(Path(found["data_dir"]))
    identity = directory.identity()
    if identity is None or str(identity[0]) != found["node"]:
        raise EdgeBrokerError("the root key never crosses the network: run this on the root of the fleet itself")
    return directory


def _passphrase(prompt: str) -> bytes:
    """Asked for at a terminal, a line of standard input otherwise."""
    text = getpass.getpass(prompt) if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    return text.encode()
