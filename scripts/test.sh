#!/usr/bin/env bash
# Unit, property and integration tests, on real etcd, nginx and Docker.
# `--soak` runs only those with a long form, one at a time, and prints their figures.
set -euo pipefail

features=(--all-features)
if [ "${1:-}" = "--soak" ]; then
    long=(switches:: tcp_routes:: health:: crash:: store_trust:: properties:: isolation::)
    if cargo nextest --version >/dev/null 2>&1; then
        exec env NEXTEST_PROFILE=soak cargo nextest run "${features[@]}" --test real --test pure --no-capture --no-fail-fast "${long[@]}"
    fi
    exec cargo test "${features[@]}" --test real --test pure --no-fail-fast -- --nocapture --test-threads 1 "${long[@]}"
fi
if [ "${DEMAE_DOCKER:-}" = "absent" ]; then
    echo "DEMAE_DOCKER=absent: the tests on real etcd, nginx and Docker are left out, as you decided"
    exec cargo test --quiet "${features[@]}" --lib --test pure --test simulation --test fuzz
fi
if cargo nextest --version >/dev/null 2>&1; then
    exec cargo nextest run "${features[@]}"
fi
exec cargo test "${features[@]}" -- --test-threads 2
