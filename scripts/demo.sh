#!/bin/sh
# One job from submit to result, with the real Claude CLI and simulated answers. Needs no account.
set -eu
cd "$(dirname "$0")/.."
scripts/need-rust.sh
scripts/install-debian.sh cc bwrap
[ -n "${CLAUDE_CLI_PATH:-}" ] || scripts/install-claude.sh
echo "Building …"
cargo build -p cli
if [ "${SANDBOX_ENABLED:-true}" = true ]; then
    . scripts/worker-user.sh
    CLAUDE_CLI_PATH=$(reachable "${CLAUDE_CLI_PATH:-$PWD/tools/claude/node_modules/.bin/claude}")
fi
export CLAUDE_CLI_PATH="${CLAUDE_CLI_PATH:-$PWD/tools/claude/node_modules/.bin/claude}"
exec cargo run --quiet -p cli -- demo "$@"
