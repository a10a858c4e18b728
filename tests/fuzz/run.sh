#!/bin/sh
# Fuzz the C headers of the core: tests/fuzz/run.sh SECONDS [TARGET...]
#
# Builds every tests/fuzz/fuzz_*.c (or the targets named, without "fuzz_" and ".c") with clang, AddressSanitizer and
# UndefinedBehaviorSanitizer, and runs each for SECONDS. Seeds come from corpus/ (for fuzz_NAME.c also corpus-NAME/ if it
# is there); what is found goes to a working directory under $TMPDIR, so that the seeds stay small. Exit: 0 nothing
# found, 1 a finding (its input is named and kept), 2 usage or missing packages.
set -eu

here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)

if [ $# -lt 1 ]; then
    echo "usage: $0 SECONDS [TARGET...]" >&2
    exit 2
fi
case $1 in
'' | *[!0-9]*)
    echo "usage: $0 SECONDS [TARGET...]" >&2
    exit 2
    ;;
esac
seconds=$1
shift

compiler=${CC_FUZZ:-clang-14}
missing=
command -v "$compiler" >/dev/null 2>&1 || missing="clang-14 libclang-rt-14-dev"
if [ -z "$missing" ] && ! [ -e "$("$compiler" -print-file-name=libclang_rt.fuzzer-x86_64.a)" ] &&
    ! [ -e "$("$compiler" -print-resource-dir)/lib/linux/libclang_rt.fuzzer-$(uname -m).a" ]; then
    missing=libclang-rt-14-dev
fi
if [ -n "$missing" ]; then
    echo "$0: missing packages: $missing (apt-get install $missing)" >&2
    exit 2
fi

[ $# -gt 0 ] || for source in "$here"/fuzz_*.c; do
    name=${source##*/fuzz_}
    set -- "$@" "${name%.c}"
done

work=$(mktemp -d "${TMPDIR:-/tmp}/edgebroker-fuzz.XXXXXX")
status=0
for name in "$@"; do
    mkdir -p "$work/$name/corpus"
    "$compiler" -g -O1 -std=gnu11 -Wall -Wextra -Wno-unused-function -fno-omit-frame-pointer \
        -fsanitize=fuzzer,address,undefined -fno-sanitize-recover=all \
        -I "$root/cext" "$here/fuzz_$name.c" -o "$work/$name/fuzz"
    seeds="$here/corpus"
    [ ! -d "$here/corpus-$name" ] || seeds="$here/corpus-$name"
    if ! "$work/$name/fuzz" -max_total_time="$seconds" -max_len=4096 -timeout=10 -print_final_stats=1 \
        -artifact_prefix="$work/$name/" "$work/$name/corpus" "$seeds" >"$work/$name/log" 2>&1; then
        status=1
    fi
    if [ $status -ne 0 ]; then
        tail -n 60 "$work/$name/log" >&2
        echo "$0: $name: a finding; input and log are in $work/$name" >&2
        exit 1
    fi
    echo "$name: $(grep -E '^stat::number_of_executed_units' "$work/$name/log" | tr -s ' ')," \
        "$(grep -E ' cov: ' "$work/$name/log" | tail -n 1 | sed 's/.*cov:/cov:/; s/ lim:.*//')"
done
rm -rf "$work"
