#!/bin/sh
# The same program compiled by Nuitka: dist/nuitka/edgebroker, as one file. Takes five minutes; larger and hungrier than
# PyInstaller's (docs/benchmarks.md), kept so that we could change. Needs gcc and patchelf.
set -eu
cd "$(dirname "$0")/.."
ENVIRONMENT=${ENVIRONMENT:-build/freeze-nuitka}
command -v patchelf >/dev/null 2>&1 || { echo "patchelf is missing: apt-get install patchelf" >&2; exit 1; }
./packaging/environment.sh "$ENVIRONMENT" "nuitka==4.3.3"
rm -rf build/tree-nuitka dist/nuitka
"$ENVIRONMENT/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-compile \
    --target build/tree-nuitka .
cp packaging/entry.py build/tree-nuitka/
cd build/tree-nuitka
PYTHONPATH=. "../../$ENVIRONMENT/bin/python" -m nuitka --mode=onefile --quiet --jobs=2 --lto=no \
    --output-dir=../../dist/nuitka --output-filename=edgebroker --include-package=edgebroker \
    --include-package-data=edgebroker --include-data-dir=../../systemd=systemd --include-module=lz4.frame \
    --include-module=zstandard.backend_c --nofollow-import-to=unittest,pydoc,doctest,setuptools,numpy,pytest,tkinter \
    entry.py
cd ../..
rm -rf dist/nuitka/entry.*
dist/nuitka/edgebroker selftest
ls -l dist/nuitka/edgebroker
