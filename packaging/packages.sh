#!/bin/sh
# What the build needs from Debian: a C compiler, the headers of the Python in use, its venv module. With `freeze` also
# what makes the frozen program, with `appliance` also what boots machines and builds images to try it.
# As root the missing packages are installed, otherwise the one line to run is printed.
set -eu
PYTHON=${PYTHON:-python3}
missing=
command -v gcc >/dev/null 2>&1 || missing="$missing gcc libc6-dev"
command -v make >/dev/null 2>&1 || missing="$missing make"
command -v "$PYTHON" >/dev/null 2>&1 || missing="$missing python3"
if command -v "$PYTHON" >/dev/null 2>&1; then
    "$PYTHON" -c 'import ensurepip, venv' 2>/dev/null || missing="$missing python3-venv"
    "$PYTHON" -c 'import sys, sysconfig, os
sys.exit(not os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h")))' || missing="$missing python3-dev"
fi
need() { # COMMAND PACKAGE
    command -v "$1" >/dev/null 2>&1 || missing="$missing $2"
}
case ${1:-} in freeze | appliance) need strip binutils ;; esac
if [ "${1:-}" = appliance ]; then
    need systemd-nspawn systemd-container
    need debootstrap debootstrap
    need mkfs.ext4 e2fsprogs
    need buildah buildah
    need prometheus prometheus
    need qemu-system-x86_64 qemu-system-x86
    need cpio cpio
fi
[ -z "$missing" ] && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null 2>&1; then
    apt-get update -qq
    # shellcheck disable=SC2086
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing >/dev/null
    exit 0
fi
echo "Some packages are missing. Run this line, then make again:" >&2
echo "    sudo apt-get install -y$missing" >&2
exit 1
