#!/bin/sh
# environment.sh DIRECTORY [PACKAGE...]: an environment that has what goes into the frozen program, and nothing else.
set -eu
directory=$1
shift
if [ ! -e "$directory/ready" ] || [ packaging/requirements.txt -nt "$directory/ready" ]; then
    rm -rf "$directory"
    "${PYTHON:-python3}" -m venv "$directory"
    pip="$directory/bin/pip install --quiet --disable-pip-version-check"
    $pip "setuptools>=77" "Cython>=3.1,<4" "flit_core>=3.2,<4"
    # The mypyc wheels of tomli cannot be frozen.
    $pip --no-binary tomli --no-build-isolation -r packaging/requirements.txt "$@"
    touch "$directory/ready"
fi
