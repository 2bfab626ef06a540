#!/usr/bin/env bash
# Makes target/dist/: the package for Debian 12 and Ubuntu 22.04 and later, a tarball for other systems, and their sums.
#
#   scripts/package.sh           optimised, which takes minutes
#   scripts/package.sh --debug   of the build that the tests use, to try the package itself
#
# DEMAE_VERSION_SUFFIX=+1 makes another version of the same, to try an upgrade.
set -euo pipefail
cd "$(dirname "$0")/.."

profile=release
if [ "${1:-}" = --debug ]; then profile=dev; fi
directory=${profile/dev/debug}
stage=target/package
dist=target/dist
version=$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)${DEMAE_VERSION_SUFFIX:-}
# The same inputs make the same files.
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}
export SOURCE_DATE_EPOCH

tool=target/tools/bin/cargo-deb
if [ ! -x "$tool" ]; then cargo install --quiet --locked --root target/tools --version 3.8.0 cargo-deb; fi

if [ "$profile" = release ]; then
    # The paths of this machine are no part of the program.
    RUSTFLAGS="--remap-path-prefix=$PWD=/demae --remap-path-prefix=${CARGO_HOME:-$HOME/.cargo}=/cargo" \
        cargo build --locked --release --bin demae
else
    cargo build --locked --all-features --bin demae
fi
demae=target/$directory/demae

rm -rf "$stage" "$dist"
mkdir -p "$stage"/{units,completions,man} "$dist"
for unit in demae.service demae-routes.service var-lib-demae-sockets.mount; do
    sed 's,/usr/local/bin/demae,/usr/bin/demae,' "deploy/$unit" >"$stage/units/$unit"
done
"$demae" completions bash >"$stage/completions/demae"
"$demae" completions zsh >"$stage/completions/_demae"
"$demae" completions fish >"$stage/completions/demae.fish"
"$demae" man --out "$stage/man"
rm -f "$stage"/man/*-help*.1
cat >"$stage/changelog" <<CHANGELOG
demae ($version) unstable; urgency=medium

  * What is new is in /usr/share/doc/demae/CHANGELOG.md.

 -- demae developers <demae@example.org>  $(LC_ALL=C date --utc --rfc-email --date="@$SOURCE_DATE_EPOCH")
CHANGELOG

"$tool" deb --no-build --no-separate-debug-symbols --locked --profile "$profile" \
    --deb-version "$version" --output "$dist/" >/dev/null
if [ -z "${DEMAE_VERSION_SUFFIX:-}" ]; then
    name=demae-$version-$(uname -m)-linux
    tree=$stage/$name
    install -D -m 0755 "$demae" "$tree/bin/demae"
    install -D -m 0644 -t "$tree/deploy" deploy/*.service deploy/*.mount deploy/*.conf deploy/agent.toml
    install -D -m 0644 -t "$tree/deploy/nginx" deploy/nginx/*
    install -D -m 0644 -t "$tree/completions" "$stage"/completions/*
    install -D -m 0644 -t "$tree/man" "$stage"/man/*
    install -D -m 0644 -t "$tree" README.md CHANGELOG.md LICENSE*
    tar -C "$stage" --sort=name --owner=0 --group=0 --numeric-owner --mtime="@$SOURCE_DATE_EPOCH" -c "$name" |
        gzip -n >"$dist/$name.tar.gz"
fi
(cd "$dist" && sha256sum -- * >SHA256SUMS && cat SHA256SUMS)
