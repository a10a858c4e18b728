#!/bin/sh
# Builds dist/edgebroker (one file) and dist/folder (the same as a folder) in an environment that has nothing else in it,
# and lets the result check itself. Twice from the same commit gives the same bytes.
set -eu
cd "$(dirname "$0")/.."
ENVIRONMENT=${ENVIRONMENT:-build/freeze}
command -v strip >/dev/null 2>&1 || { echo "strip is missing: apt-get install binutils" >&2; exit 1; }
./packaging/environment.sh "$ENVIRONMENT"
# The program itself from the sources as they are, into a place of its own.
rm -rf build/tree
"$ENVIRONMENT/bin/pip" install --quiet --disable-pip-version-check --no-deps --no-build-isolation --no-compile --target build/tree .
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 1700000000)}
export SOURCE_DATE_EPOCH PYTHONHASHSEED=1 PYTHONPATH=build/tree PYTHONDONTWRITEBYTECODE=1
rm -rf dist/edgebroker dist/folder
"$ENVIRONMENT/bin/pyinstaller" --noconfirm --clean --log-level WARN --workpath build/pyinstaller packaging/edgebroker.spec
unset PYTHONPATH
for program in dist/edgebroker dist/folder/edgebroker; do
    "$program" selftest
done
ls -l dist/edgebroker
du -sh dist/folder
