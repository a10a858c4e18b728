#!/bin/sh
# The same program compiled by Nuitka: dist/nuitka/edgebroker, as one file. Takes five minutes; larger and hungrier than
# PyInstaller's (docs/benchmarks.md), kept so that we could change. Needs gcc and patchelf.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
ENVIRONMENT=${ENVIRONMENT:-build/freeze-nuitka}
command -v patchelf >/dev/null 2>&1 || { echo "patchelf is missing: apt-get install patchelf" >&2; exit 1; }
if [ ! -e "$ENVIRONMENT/ready" ] || [ packaging/requirements.txt -nt "$ENVIRONMENT/ready" ]; then
    rm -rf "$ENVIRONMENT"
    "$PYTHON" -m venv "$ENVIRONMENT"
    "$ENVIRONMENT/bin/pip" install --quiet --disable-pip-version-check "setuptools>=77" "Cython>=3.1,<4" "flit_core>=3.2,<4"
    "$ENVIRONMENT/bin/pip" install --quiet --disable-pip-version-check --no-binary tomli --no-build-isolation -r packaging/requirements.txt
    "$ENVIRONMENT/bin/pip" install --quiet --disable-pip-version-check "nuitka==4.3.3" zstandard
    touch "$ENVIRONMENT/ready"
fi
rm -rf build/tree-nuitka dist/nuitka
"$ENVIRONMENT/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-compile --target build/tree-nuitka .
cp packaging/entry.py build/tree-nuitka/entry.py
cd build/tree-nuitka
PYTHONPATH=. "../../$ENVIRONMENT/bin/python" -m nuitka --mode=onefile --quiet --assume-yes-for-downloads --jobs=2 --lto=no \
    --output-dir=../../dist/nuitka --output-filename=edgebroker --include-package=edgebroker \
    --include-package-data=edgebroker --include-data-dir=../../systemd=systemd --include-module=lz4.frame \
    --include-module=zstandard.backend_c --nofollow-import-to=unittest,pydoc,doctest,setuptools,numpy,pytest,tkinter \
    entry.py
cd ../..
rm -rf dist/nuitka/entry.*
dist/nuitka/edgebroker selftest
ls -l dist/nuitka/edgebroker
