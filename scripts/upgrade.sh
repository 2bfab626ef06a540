#!/usr/bin/env bash
# From the agent of another commit to this one and back, with 20 apps under load: no container is replaced, no request fails.
set -euo pipefail

from=${1:-}
if [ -z "$from" ]; then
    echo "say which version to upgrade from: make upgrade FROM=<commit>" >&2
    exit 2
fi
commit=$(git rev-parse --verify "$from^{commit}")
source=$PWD/target/upgrade/source
rm -rf "$source"
mkdir -p "$source"
git archive "$commit" | tar -x -C "$source"
(cd "$source" && CARGO_TARGET_DIR=../build cargo build --quiet --bin demae)
export DEMAE_OTHER_VERSION=$PWD/target/upgrade/build/debug/demae
exec cargo test --quiet --all-features --test real -- --ignored --exact \
    upgrade::upgrade_and_downgrade_replace_no_container_and_lose_no_request --nocapture
