"""`edgebroker install`: its flags. The work is in cli/appliance."""

from __future__ import annotations

from edgebroker.cli.command import DeferredHandler, Parser


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=DeferredHandler("appliance.install", "install"))
    parser.description = (
        "Install this program as a systemd service. Run it again to change the installation: flags that are left out "
        "keep what is configured, and files that were edited by hand are never overwritten."
    )
    parser.add_argument("--role", default="", choices=("root", "l2", "l3", "pos", "local"), help="level in the tree")
    parser.add_argument("--id", default="", metavar="NAME", help="name of the node (default: the host name)")
    parser.add_argument(
        "--parent",
        action="append",
        default=[],
        metavar="URL",
        help="https://HOST:PORT of a parent; repeat it for alternatives, the preferred one first",
    )
    parser.add_argument(
        "--registry", default="", metavar="URL", help="https://HOST:PORT of a node that can reach the registry"
    )
    parser.add_argument("--region", default="", help="region of the node, for example north/store-12")
    parser.add_argument("--labels", default="", metavar="NAME=VALUE,...", help="labels of the node")
    parser.add_argument(
        "--bind",
        default="",
        metavar="ADDRESS",
        help="address to listen on, to be reachable from other machines (default 127.0.0.1)",
    )
    parser.add_argument("--fleet", default="", metavar="NAME", help="name of the fleet, which a root creates")
    parser.add_argument(
        "--token", default="", metavar="TOKEN", help="token to join the fleet with; - reads it, @FILE from a file"
    )
    parser.add_argument("--start", action="store_true", help="start the service and wait until it is ready")
    parser.add_argument("--refresh", action="store_true", help="only update the unit files to this release")
    target_flags(parser)


def target_flags(parser: Parser) -> None:
    """Which node of which machine; also for uninstall."""
    parser.add_argument(
        "--instance", default="", metavar="NAME", help="an additional node of this machine: edgebroker@NAME"
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be done, and do nothing")
    parser.add_argument("--root", default="/", metavar="DIR", help="root directory of an image, instead of /")
