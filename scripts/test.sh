#!/usr/bin/env bash
# Unit, property and integration tests, on real etcd, nginx and Docker.
# `--soak` runs only those with a long form, one at a time, and prints their figures.
set -euo pipefail

features=(--all-features)
if [ "${1:-}" = "--soak" ]; then
    long=(--test switches --test health --test crash --test doubt --test properties --test isolation)
    if cargo nextest --version >/dev/null 2>&1; then
        exec env NEXTEST_PROFILE=soak cargo nextest run "${features[@]}" "${long[@]}" --no-capture --no-fail-fast
    fi
    exec cargo test "${features[@]}" "${long[@]}" --no-fail-fast -- --nocapture --test-threads 1
fi
if [ "${DEMAE_DOCKER:-}" = "absent" ]; then
    echo "DEMAE_DOCKER=absent: the tests on real etcd, nginx and Docker are left out, as you decided"
    exec cargo test --quiet "${features[@]}" --lib --test properties --test simulation --test fuzz --test layering --test documented --test cli
fi
if cargo nextest --version >/dev/null 2>&1; then
    exec cargo nextest run "${features[@]}"
fi
exec cargo test "${features[@]}" -- --test-threads 2
