"""Where the frozen program begins."""

import sys

from edgebroker.cli.main import main

if "__compiled__" in globals():  # by Nuitka, which does not say it the way PyInstaller does
    from os.path import abspath
    from shutil import which

    sys.frozen = True  # type: ignore[attr-defined]
    sys.executable = abspath(which(sys.argv[0]) or sys.argv[0])

sys.exit(main())
