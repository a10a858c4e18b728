"""`edgebroker upgrade`: its flags. The work is in cli/appliance."""

from __future__ import annotations

from edgebroker.cli.command import DeferredHandler, Parser, duration


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=DeferredHandler("appliance.upgrade", "upgrade"))
    parser.description = (
        "Verify the program of another release, switch to it and restart the nodes of this machine. If a node does not "
        "become ready in time, switch back to the release before."
    )
    parser.add_argument("file", nargs="?", help="the program of the new release")
    parser.add_argument("--signature", default="", metavar="FILE", help="its signature (default FILE.minisig)")
    parser.add_argument("--sha256", default="", metavar="HEX", help="its SHA-256 digest, as published")
    parser.add_argument("--unsigned", action="store_true", help="take it without a signature, by its digest alone")
    parser.add_argument("--downgrade", action="store_true", help="take a release that is older than the running one")
    parser.add_argument("--undo", action="store_true", help="switch back to the previous release")
    parser.add_argument("--resume", action="store_true", help="only finish an upgrade that was interrupted")
    parser.add_argument(
        "--accept-format",
        action="store_true",
        help="accept a newer data format, which only restoring a backup can undo",
    )
    parser.add_argument(
        "--timeout",
        type=duration,
        default=60.0,
        metavar="TIME",
        help="time for each node to become ready (default 60s)",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
