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
scripts/need-rust.sh
scripts/install-debian.sh cc bwrap curl jq pgbouncer postgres
scripts/install-claude.sh
scripts/install-python.sh
scripts/install-node.sh
scripts/install-typescript.sh
step "format"
cargo fmt --check
step "supply chain"
scripts/deny.sh
step "lints"
cargo clippy --workspace --all-targets -- -D warnings
# Programs and tests in one go: asked for apart, they differ in the features of libraries, and each library that has
# one of these above it is compiled twice.
# The examples are checked by now, and no test runs them.
targets="--lib --bins --tests"
step "build"
cargo build --workspace $targets
# The documentation is written while the tests wait for processes. Private items are in it, so links to them are right.
# It begins a little later: cargo would make the tests wait for it.
documentation=$(mktemp)
trap 'rm -f "$documentation"' EXIT
(
    sleep 10
    RUSTDOCFLAGS="-D warnings -A rustdoc::private-intra-doc-links" \
        exec cargo doc --workspace --no-deps --document-private-items
) >"$documentation" 2>&1 &
writing=$!
step "tests"
tests=0
# Most cases of the integration tests wait for processes, so more of them than cores run at once (with 4 at a time two
# cores are half idle). What fails hides nothing
# that comes after it.
RUST_TEST_THREADS=6 cargo test --workspace --no-fail-fast $targets || tests=$?
step "documentation"
if ! wait "$writing"; then
    cat "$documentation" >&2
    exit 1
fi
[ "$tests" -eq 0 ] || exit "$tests"
step "all passed"
