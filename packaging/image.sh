#!/bin/sh
# Builds the container image edgebroker:VERSION with the engine that is there. BASE names another base image.
set -eu
cd "$(dirname "$0")/.."
VERSION=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' edgebroker/version.py)
set -- -t "edgebroker:$VERSION" -t edgebroker:latest ${BASE:+--build-arg "BASE=$BASE"} -f packaging/Dockerfile .
if docker info >/dev/null 2>&1; then
    exec docker build "$@"
fi
for engine in podman buildah; do
    # Only this format has a health check.
    command -v "$engine" >/dev/null 2>&1 && exec "$engine" build --format docker "$@"
done
echo "docker (with its engine running), podman or buildah is needed" >&2
exit 1
