#!/bin/sh
# Everything that has to hold before a change is taken: format, lints, build, tests, documentation.
set -eu
cd "$(dirname "$0")/.."

step() {
    now=$(date +%s)
    [ -z "${began:-}" ] || echo "    took $((now - began)) s"
    began=$now
    echo "==> $*"
}

step "what the tests need"
scripts/install-debian.sh cc bwrap pgbouncer postgres
scripts/install-claude.sh
step "format"
cargo fmt --check
step "lints"
cargo clippy --workspace --all-targets -- -D warnings
# The tests start the binaries, so all of them are built first, in the profile that the tests are built in.
step "build"
cargo build --workspace --bins
step "tests"
# Most cases of the integration tests wait for processes, so more of them than cores run at once.
RUST_TEST_THREADS=4 cargo test --workspace
step "documentation"
# For those who read the code: private items are in it, so links to them are right.
RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" cargo doc --workspace --no-deps --document-private-items
step "all passed"
