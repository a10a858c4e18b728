"""`edgebroker uninstall`: its flags. The work is in cli/appliance."""

from __future__ import annotations

from edgebroker.cli.command import DeferredHandler, Parser
from edgebroker.cli.commands.install import target_flags


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=DeferredHandler("appliance.install", "uninstall"))
    parser.description = "Remove the service of a node. Its data and configuration stay, unless --purge is given."
    parser.add_argument("--purge", action="store_true", help="also delete the data and the configuration")
    parser.add_argument("--yes", action="store_true", help="confirm --purge")
    target_flags(parser)
