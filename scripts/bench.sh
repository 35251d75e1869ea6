#!/bin/sh
# Measures the release build and prints tables. Takes some minutes; wants a machine that does nothing else.
set -eu
cd "$(dirname "$0")/.."

scripts/need-rust.sh
scripts/install-debian.sh cc bwrap postgres
scripts/install-claude.sh
cargo build --release --workspace --bins --examples
target/release/examples/bench
for bench in target/release/examples/bench-claims; do
    [ ! -x "$bench" ] || "$bench"
done
