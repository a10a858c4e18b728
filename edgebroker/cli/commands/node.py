"""`edgebroker node`: which parents and children the nodes of a tree have, and who belongs to its fleet."""

from __future__ import annotations

import argparse
import json
from urllib.parse import quote

from edgebroker.cli.admin_client import call
from edgebroker.cli.command import Parser, admin_flag, duration, json_flag, label_flag, subcommand, subcommands
from edgebroker.cli.commands.tree import label_query
from edgebroker.cli.render import counted
from edgebroker.common.errors import ConfigError


def arguments(parser: Parser) -> None:
    parser.description = "Change the tree, at the node that has the registry (name it with --admin)."
    commands = subcommands(parser)
    pin_parser = subcommand(commands, "pin", "fix the parents of a node", pin)
    unpin_parser = subcommand(commands, "unpin", "let the registry choose the parents of a node again", unpin)
    drain_parser = subcommand(commands, "drain", "move the children of a node to other parents", drain)
    undrain_parser = subcommand(commands, "undrain", "let a node have children again", undrain)
    remove_parser = subcommand(commands, "remove", "remove a node that no longer reports", remove)
    every = (pin_parser, unpin_parser, drain_parser, undrain_parser, remove_parser)
    for each in every:
        each.add_argument("name", nargs="?" if each is remove_parser else None, help="name or uid of the node")
    pin_parser.add_argument("parent", nargs="+", help="names or uids of its parents, the preferred one first")
    remove_parser.add_argument(
        "--silent", type=duration, metavar="TIME", help="all nodes that were silent for so long: 90s, 30m, 12h or 2d"
    )
    label_flag(remove_parser)
    revoke_parser = subcommand(commands, "revoke", "shut nodes out of the fleet, at its root", revoke)
    approve_parser = subcommand(commands, "approve", "let nodes in that wait for it, or were revoked", approve)
    revoke_parser.add_argument(
        "--erase", action="store_true", help="they destroy their keys, then all that they store, when they hear of it"
    )
    for each in (revoke_parser, approve_parser):
        each.add_argument("names", nargs="+", metavar="NODE", help="names or uids of the nodes, as they joined")
    for each in (*every, revoke_parser, approve_parser):
        admin_flag(each)
        json_flag(each)


def pin(options: argparse.Namespace) -> int:
    return _change(options, "PUT", "/pins", {"parents": options.parent})


def unpin(options: argparse.Namespace) -> int:
    return _change(options, "PUT", "/pins", {"parents": []})


def drain(options: argparse.Namespace) -> int:
    return _change(options, "PUT", "/drain")


def undrain(options: argparse.Namespace) -> int:
    return _change(options, "DELETE", "/drain")


def remove(options: argparse.Namespace) -> int:
    if (options.name is None) == (options.silent is None):
        raise ConfigError("name a node, or say with --silent 30d which nodes are to be removed")
    if options.name is not None:
        return _change(options, "DELETE", "")
    query = f"silent={options.silent:g}&{label_query(options.label)}"
    answer = call(options.admin, "DELETE", f"/v1/registry?{query}")
    print(json.dumps(answer) if options.json else f"{counted(answer['removed'], 'node')} removed")
    return 0


def revoke(options: argparse.Namespace) -> int:
    body = {"nodes": options.names, "erase": options.erase}
    return _decide(options, "revoke", body, "revoked: every node that is connected shuts it out within seconds")


def approve(options: argparse.Namespace) -> int:
    return _decide(options, "approve", {"nodes": options.names}, "approved: it gets a certificate when it asks again")


def _decide(options: argparse.Namespace, what: str, body: object, said: str) -> int:
    answer = call(options.admin, "POST", f"/v1/trust/{what}", body)
    if options.json:
        print(json.dumps(answer))
    else:
        for name in options.names:
            print(f"{name} is {said}")
    return 0


def _change(options: argparse.Namespace, method: str, path: str, body: object = None) -> int:
    answer = call(options.admin, method, f"/v1/registry/{quote(options.name, safe='')}{path}", body)
    if options.json:
        print(json.dumps(answer))
    return 0
