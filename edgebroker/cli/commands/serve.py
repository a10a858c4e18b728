"""`edgebroker serve`: its flags. The process is in cli/service."""

from __future__ import annotations

from edgebroker.cli.command import DeferredHandler, Parser


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=DeferredHandler("service.serve", "serve"))
    parser.description = (
        "Run a broker in the foreground until SIGTERM or SIGINT. SIGHUP reloads the configuration. Without a "
        "configuration file it uses safe defaults and listens on 127.0.0.1 only."
    )
    parser.add_argument("-c", "--config", metavar="FILE", help="configuration file (TOML)")
    parser.add_argument("--data-dir", metavar="DIR", help="data directory; overrides node.data_dir")
    parser.add_argument("--listen", metavar="HOST:PORT", help="address for clients; overrides listen.tcp")
    parser.add_argument("--http", metavar="HOST:PORT", help="address for administration; overrides listen.http")
    parser.add_argument("--pipe", metavar="HOST:PORT", help="address for the nodes below; overrides listen.pipe")
    parser.add_argument(
        "--ports-file", metavar="FILE", help="once ready, write the addresses to FILE as JSON; useful with port 0"
    )
