#!/bin/sh
# The chaos on both databases, bigger than in `make test`: CHAOS_JOBS jobs on each (10000), CHAOS_SEED repeats a course.
# Prints the faults, what they did, and how long it took; fails when a promise was broken.
set -eu
cd "$(dirname "$0")/.."

scripts/need-rust.sh
scripts/install-debian.sh cc postgres
export CHAOS_JOBS="${CHAOS_JOBS:-10000}"
cargo build --workspace --bins
exec cargo test --package tests --test it -- chaos:: --nocapture --test-threads 1
