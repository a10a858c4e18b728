"""`python -m edgebroker` and the entry point of the `edgebroker` command."""

import sys

from edgebroker.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
