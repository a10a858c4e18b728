"""`edgebroker support-bundle`: its flags. The work is in cli/appliance."""

from __future__ import annotations

from edgebroker.cli.command import DeferredHandler, Parser, admin_flag


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=DeferredHandler("appliance.bundle", "support_bundle"))
    parser.description = (
        "Collect the state, configuration, journal and file lists of the nodes of this machine into one archive. "
        "Records are left out, and what looks like a secret is replaced by ***."
    )
    parser.add_argument("file", nargs="?", help="archive to write (default: edgebroker-HOST-TIME.tar.gz)")
    parser.add_argument("-c", "--config", metavar="FILE", help="configuration file (default: all in /etc/edgebroker)")
    admin_flag(parser)
