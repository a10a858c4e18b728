"""The command line: the table of its verbs, and the way from an argument list to an exit code.

Each verb is a module of its own name in cli/commands/. Only the module of the verb that was called is imported, so that
the command line starts fast.

Data goes to stdout, progress and logs to stderr. Exit codes: 0 ok, 1 failure, 2 usage or configuration, 3 unreachable,
4 damaged data found, 75 data directory in use, 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from itertools import pairwise
from typing import NamedTuple

from edgebroker.cli import command
from edgebroker.cli.command import Parser
from edgebroker.common.names import printable
from edgebroker.common.runtime.program import TRUST_WORKER
from edgebroker.version import __version__


class Verb(NamedTuple):
    name: str
    help: str
    usage_exit: int = command.USAGE  # the exit code when it is called with wrong arguments

    def add_arguments(self, parser: Parser) -> None:
        module = import_module(f"edgebroker.cli.commands.{self.name.replace('-', '_')}")
        module.arguments(parser)


VERBS = (
    Verb("serve", "run a broker in the foreground"),
    Verb("publish", "publish records from stdin or a CSV file"),
    Verb("consume", "print the records of topics as they arrive"),
    Verb("app", "run an application on its own copy of topics"),
    Verb("topic", "create, list, describe, alter, rename and delete topics"),
    Verb("group", "list, describe, reset, refresh and delete consumer groups"),
    Verb("dlq", "list, show, replay and drop dead letters"),
    Verb("status", "show the state of a node on one screen"),
    # A monitoring system takes 2 for CRITICAL; a wrong call is 3, UNKNOWN.
    Verb("check", "check a node for a monitoring system", usage_exit=3),
    Verb("pipe", "show replication from the parent and to the children"),
    Verb("tree", "show the nodes below this one"),
    Verb("wait", "wait until the nodes below have applied a topic"),
    Verb("node", "pin, drain and remove nodes of the tree"),
    Verb("fleet", "create the fleet that nodes belong to"),
    Verb("token", "create, list and revoke tokens: of machines that join, and of applications"),
    Verb("access", "show and change who may do what"),
    Verb("tenant", "show and set what tenants of a fleet may have"),
    Verb("audit", "show who changed what at a node, and who was refused"),
    Verb("join", "make this node a node of a fleet"),
    Verb("trust", "show this node's certificate and its fleet"),
    Verb("child", "list and forget the children of a node"),
    Verb("resync", "load topics again from the parent"),
    Verb("repair", "fetch corrupt ranges from another node"),
    Verb("verify", "compare the logs of two nodes byte for byte"),
    Verb("promote", "make a replica the origin of its topics"),
    Verb("backup", "copy the logs of a running node"),
    Verb("restore", "create a data directory from a backup"),
    Verb("log", "inspect segment files, even of a stopped node"),
    Verb("config", "check, show and create configuration files"),
    Verb("install", "install this program as a systemd service"),
    Verb("uninstall", "remove the service and keep its data"),
    Verb("upgrade", "switch to another release, with automatic rollback"),
    Verb("support-bundle", "collect diagnostics, without records or secrets"),
    Verb("bench", "benchmark a running broker or a disk"),
    Verb("demo", "run the demonstration and check its result"),
    Verb("selftest", "check that this program is complete and works here"),
    Verb("completion", "print a shell completion script"),
    Verb("version", "print the version"),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code."""
    closed = command.open_standard_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == [TRUST_WORKER]:
        return _help_node(words[1:])
    for word in words:
        if not word.isascii() and word.encode(errors="replace").decode() != word:
            print(f"edgebroker: {printable(word)!r} is not UTF-8; call it in a UTF-8 locale", file=sys.stderr)
            return command.USAGE
    called = _called(words)
    verb = next((verb for verb in VERBS if verb.name == called), None)
    if called and verb is None:
        return _unknown(called)
    usage_exit = verb.usage_exit if verb is not None else command.USAGE
    try:
        options = build_parser(called).parse_args(words)
    except SystemExit as error:
        if error.code == command.USAGE:
            return usage_exit
        raise
    except ModuleNotFoundError as error:
        return command.incomplete(error)
    if not hasattr(options, "run"):
        options.parser.print_help(sys.stderr)
        return usage_exit
    options.closed_streams = closed
    return command.run(options.run, options)


def build_parser(only: str | None = None) -> Parser:
    """The parser of the command line, with the arguments of all verbs, or of `only` one."""
    parser = Parser(
        prog="edgebroker",
        description="A durable message broker, from the cloud to the store terminal.",
        epilog="Run 'edgebroker COMMAND --help' for the flags of a command.",
    )
    parser.add_argument("--version", action="version", version=f"edgebroker {__version__}")
    parser.add_argument(
        "--via",
        default="",
        metavar="NODE",
        help="run the command at a node below this one, through the tree: its name, or its uid",
    )
    commands = command.subcommands(parser)
    for verb in VERBS:
        verb_parser = commands.add_parser(verb.name, help=verb.help, description=command.sentence(verb.help))
        if only is None or verb.name == only:
            verb.add_arguments(verb_parser)
    return parser


def _help_node(words: Sequence[str]) -> int:
    """The helper process of a node, which starts it itself."""
    from edgebroker.trust.worker import main as work

    return work(words)


def _called(words: Sequence[str]) -> str:
    """The verb: the first word that is neither a flag nor the value of --via."""
    for before, word in pairwise(["", *words]):
        if not word.startswith("-") and before != "--via":
            return word
    return ""


def _unknown(name: str) -> int:
    from difflib import get_close_matches

    similar = get_close_matches(name, [verb.name for verb in VERBS], 1)
    hint = f"; did you mean {similar[0]!r}?" if similar else ""
    print(f"edgebroker: {name!r} is not a command{hint} (edgebroker --help lists all)", file=sys.stderr)
    return command.USAGE
