"""`edgebroker version`."""

import argparse
import json
import platform

from edgebroker.version import DATA_FORMAT, __version__


def version(options: argparse.Namespace) -> int:
    if options.json:
        print(json.dumps({"version": __version__, "data_format": DATA_FORMAT, "python": platform.python_version()}))
    else:
        print(f"edgebroker {__version__}")
    return 0
