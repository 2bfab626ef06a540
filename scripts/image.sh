#!/usr/bin/env bash
# Builds the agent, static, and its image from it: scripts/image.sh [TAG]
#
# DEMAE_IMAGE_PROFILE=dev builds quickly in place of well. DEMAE_IMAGE_BINARY=FILE takes that binary and builds none.
set -euo pipefail
cd "$(dirname "$0")/.."

tag=${1:-demae:local}
profile=${DEMAE_IMAGE_PROFILE:-release}
binary=${DEMAE_IMAGE_BINARY:-}

if [ -z "$binary" ]; then
    # A target directory of its own: other flags would have everything built anew in the usual one. The target is named,
    # so that the flags are not for build scripts and macros, which cannot be static.
    triple=$(rustc -vV | sed -n 's/^host: //p')
    RUSTFLAGS="-C target-feature=+crt-static" cargo build --profile "$profile" --locked --bin demae \
        --target "$triple" --target-dir target/image
    binary=target/image/$triple/$([ "$profile" = dev ] && echo debug || echo "$profile")/demae
fi
# It is only there while the image is built: whoever builds the image later means the source.
trap 'rm -rf dist' EXIT
mkdir -p dist
# A link cannot be used: it may leave the build context.
install -m 0755 "$binary" dist/demae

# With a binary at hand the stage that would build one needs no toolchain.
build() {
    # What it prints is of interest only if it fails; the older builder always complains of its age.
    if ! log=$(docker build --file deploy/Dockerfile --build-arg RUST_IMAGE=debian:bookworm-slim "$@" . 2>&1); then
        echo "$log" >&2
        exit 1
    fi
}
# The stage gets a name, so that it can be removed: the older builder leaves it behind without one.
build --target build --tag "$tag-build"
build --tag "$tag" \
    --build-arg VERSION="$(sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -1)" \
    --build-arg REVISION="$(git rev-parse HEAD 2>/dev/null || echo unknown)"
docker rmi "$tag-build" >/dev/null
echo "$tag"
