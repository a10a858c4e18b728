"""Where the frozen program begins."""

import sys

from edgebroker.cli.main import main

sys.exit(main())
