#!/usr/bin/env bash
# The long run of fuzzing: libFuzzer, led by the code that an input reaches, on the compiler that is there.
# `scripts/fuzz.sh [TARGET…]`, else all targets, one after the other; DEMAE_FUZZ_SECONDS for each, 600 unless given.
set -euo pipefail
cd "$(dirname "$0")/.."

seconds=${DEMAE_FUZZ_SECONDS:-600}
targets=("$@")
if [ "${#targets[@]}" -eq 0 ]; then
    for file in fuzz/fuzz_targets/*.rs; do targets+=("$(basename "$file" .rs)"); done
fi

# What is fuzzed has the libraries of what ships.
cp Cargo.lock fuzz/Cargo.lock
host=$(rustc -vV | sed -n 's/^host: //p')
# What `cargo fuzz run --sanitizer none` sets, which needs no nightly compiler. demae has no `unsafe`, so a sanitizer would
# watch its libraries alone.
export RUSTFLAGS="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
-Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
-Cllvm-args=-sanitizer-coverage-trace-compares"
# With `--target` build scripts do without these flags; they could not be linked with them.
cargo build --quiet --release --manifest-path fuzz/Cargo.toml --target "$host" --target-dir target/fuzz

mkdir -p target/fuzz/found
for target in "${targets[@]}"; do
    echo "fuzz: $target, for $seconds s"
    # What reaches new code is kept below `target/`, for the next run; the corpus of the repository is only read.
    mkdir -p "target/fuzz/corpus/$target"
    if ! "target/fuzz/$host/release/$target" "target/fuzz/corpus/$target" "fuzz/corpus/$target" \
        -dict="fuzz/dictionaries/$target.dict" -artifact_prefix="target/fuzz/found/$target-" \
        -max_total_time="$seconds" -max_len=8192 -timeout=20 -rss_limit_mb=2048 -verbosity=0 -print_final_stats=1; then
        echo "error: $target breaks a promise; copy the input from target/fuzz/found/ to fuzz/corpus/$target/:" \
            "\`cargo test --test fuzz -- --exact $target\` tries it first, and makes it shorter" >&2
        exit 1
    fi
done
