"""`edgebroker demo`: its flags. The demonstration is in cli/demo."""

from __future__ import annotations

from edgebroker.cli.command import DeferredHandler, Parser, at_least, json_flag


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=DeferredHandler("demo.demo", "demo"))
    parser.description = (
        "Run its own brokers on real retail data, kill them, cut the network between them and damage a file; then "
        "check that every record arrived, in order. Takes about half a minute."
    )
    parser.add_argument(
        "--rate", type=at_least(1), default=5000, metavar="N", help="publish N records a second (default 5000)"
    )
    json_flag(parser)
