#!/bin/sh
# Builds dist/edgebroker_VERSION_ARCH.deb around the folder form (make freeze comes first). The same folder gives the same
# bytes.
set -eu
cd "$(dirname "$0")/.."
FOLDER=${FOLDER:-dist/folder}
OUT=${OUT:-dist}
[ -x "$FOLDER/edgebroker" ] || { echo "$FOLDER is missing: make freeze" >&2; exit 1; }
command -v dpkg-deb >/dev/null 2>&1 || { echo "dpkg-deb is missing: apt-get install dpkg" >&2; exit 1; }
VERSION=$("$FOLDER/edgebroker" version | cut -d' ' -f2)
ARCH=$(dpkg --print-architecture)
# Before this glibc the program would not start; the same figure stands in the README, and a test holds them together.
GLIBC=2.35
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || echo 1700000000)}
export SOURCE_DATE_EPOCH

tree=$(mktemp -d)
trap 'rm -rf "$tree"' EXIT
mkdir -p "$tree/DEBIAN" "$tree/usr/lib/systemd/system" "$tree/usr/lib/sysusers.d" "$tree/usr/lib/tmpfiles.d" "$tree/usr/bin" "$tree/etc/default" \
    "$tree/usr/share/doc/edgebroker" "$tree/usr/share/bash-completion/completions" "$tree/usr/share/zsh/vendor-completions"
cp -a "$FOLDER" "$tree/usr/lib/edgebroker"
ln -s ../lib/edgebroker/edgebroker "$tree/usr/bin/edgebroker"
cp systemd/edgebroker.service systemd/edgebroker@.service "$tree/usr/lib/systemd/system/"
cp systemd/edgebroker.sysusers "$tree/usr/lib/sysusers.d/edgebroker.conf"
cp systemd/edgebroker.tmpfiles "$tree/usr/lib/tmpfiles.d/edgebroker.conf"
cp packaging/debian/default "$tree/etc/default/edgebroker"
cp LICENSE "$tree/usr/share/doc/edgebroker/copyright"
"$FOLDER/edgebroker" completion bash > "$tree/usr/share/bash-completion/completions/edgebroker"
"$FOLDER/edgebroker" completion zsh > "$tree/usr/share/zsh/vendor-completions/_edgebroker"
for script in postinst prerm postrm; do
    install -m 755 "packaging/debian/$script" "$tree/DEBIAN/$script"
done
echo /etc/default/edgebroker > "$tree/DEBIAN/conffiles"
cat > "$tree/DEBIAN/control" <<CONTROL
Package: edgebroker
Version: $VERSION
Architecture: $ARCH
Maintainer: The edgebroker authors <edgebroker@example.org>
Section: net
Priority: optional
Depends: libc6 (>= $GLIBC), systemd
Installed-Size: $(du -sk "$tree/usr" | cut -f1)
Description: message broker for trees of machines, down to store terminals
 Prices, items, promotions and settings are published once at the top and reach
 every terminal complete and in order; they stay usable there without a network.
 This package has the broker with its command line, for every level of the tree.
CONTROL
find "$tree" -type d -exec chmod 755 {} +
find "$tree/usr/lib/systemd" "$tree/usr/lib/sysusers.d" "$tree/usr/lib/tmpfiles.d" "$tree/usr/share" "$tree/etc" -type f -exec chmod 644 {} +
find "$tree" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
mkdir -p "$OUT"
dpkg-deb -Zxz --root-owner-group --build "$tree" "$OUT/edgebroker_${VERSION}_$ARCH.deb"
