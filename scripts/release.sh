#!/usr/bin/env bash
# A release: target/dist/ with the package, the tarball, a list of all that is in them, their sums and a signature.
#
#   scripts/release.sh    20 min: it builds twice, and the results must be the same
#
# DEMAE_MINISIGN_KEY=FILE signs the sums with that key; without it they are not signed, and it says so.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "$(git status --porcelain)" ]; then
    echo "error: there are changes that are not committed" >&2
    exit 1
fi
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)
grep -q "^## \[$version\]" CHANGELOG.md || echo "note: CHANGELOG.md has no section [$version] yet" >&2

echo "building"
scripts/package.sh >/dev/null
echo "building again, elsewhere"
other=$(mktemp -d)
trap 'rm -rf "$other"' EXIT
git clone --quiet . "$other/demae"
mkdir -p "$other/demae/target"
cp -r target/tools "$other/demae/target/tools"
"$other/demae/scripts/package.sh" >/dev/null
if ! diff target/dist/SHA256SUMS "$other/demae/target/dist/SHA256SUMS"; then
    echo "error: two builds of the same differ" >&2
    exit 1
fi

echo "listing what is in it"
cyclonedx=target/tools/bin/cargo-cyclonedx
if [ ! -x "$cyclonedx" ]; then
    cargo install --quiet --locked --root target/tools --version 0.5.9 cargo-cyclonedx
fi
"$cyclonedx" cyclonedx --format json --target x86_64-unknown-linux-gnu --override-filename "demae-$version.cdx"
mv "demae-$version.cdx.json" target/dist/
cd target/dist
sha256sum -- *.deb *.tar.gz *.json >SHA256SUMS
if [ -n "${DEMAE_MINISIGN_KEY:-}" ]; then
    minisign -S -s "$DEMAE_MINISIGN_KEY" -t "demae $version" -m SHA256SUMS
else
    echo "note: DEMAE_MINISIGN_KEY is not set, so nothing is signed" >&2
fi
ls -l
