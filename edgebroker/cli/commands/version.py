"""`edgebroker version`."""

from __future__ import annotations

import argparse
import json

from edgebroker.cli.command import Parser, json_flag
from edgebroker.version import DATA_FORMAT, __version__


def arguments(parser: Parser) -> None:
    parser.set_defaults(run=version)
    json_flag(parser)


def version(options: argparse.Namespace) -> int:
    if options.json:
        import platform

        print(json.dumps({"version": __version__, "data_format": DATA_FORMAT, "python": platform.python_version()}))
    else:
        print(f"edgebroker {__version__}")
    return 0
