#!/bin/sh
# Measures the release build and prints tables. Takes some minutes; wants a machine that does nothing else.
# FORMER=REF builds that commit or tag too, and its figures stand beside these.
set -eu
cd "$(dirname "$0")/.."

scripts/need-rust.sh
scripts/install-debian.sh cc bwrap postgres
scripts/install-claude.sh
cargo build --release --workspace --bins --examples
if [ -n "${FORMER:-}" ]; then
    former=target/former
    [ -d "$former" ] || git worktree add --detach "$former" "$FORMER"
    git -C "$former" checkout --quiet --detach "$FORMER"
    (cd "$former" && cargo build --release --workspace --bins)
    set -- --former "$former/target/release"
fi
target/release/examples/bench-http "$@"
target/release/examples/bench
target/release/examples/bench-gateway
target/release/examples/bench-reads
target/release/examples/bench-claims
target/release/examples/bench-webhooks
