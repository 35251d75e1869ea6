#!/bin/sh
# Serves for real, on SQLite, with this machine's Anthropic credential.
set -eu
cd "$(dirname "$0")/.."
scripts/need-rust.sh
scripts/install-debian.sh cc bwrap

# The value of a variable: from the environment, else from .env.
setting() {
    eval "value=\${$1:-}"
    if [ -z "$value" ] && [ -f .env ]; then
        value=$(sed -n "s/^[[:space:]]*\(export[[:space:]]\{1,\}\)\{0,1\}$1=//p" .env | tail -n 1 | tr -d "\"'")
    fi
    echo "$value"
}
WORKER_USER=$(setting WORKER_USER)
. scripts/worker-user.sh
random() { od -An -N32 -tx1 /dev/urandom | tr -d ' \n'; }

if [ ! -f .env ]; then
    (
        umask 077
        echo "# Made by make up. .env.example has every setting."
        echo "API_KEYS=cq_$(random)"
        echo "SECRET_KEY=$(random)"
        if [ "$(id -u)" -eq 0 ]; then
            echo "WORKER_USER=$WORKER_USER"
            # A checkout may lie where this user can't go.
            echo "DATA_DIR=/var/lib/claude-queue/data"
            echo "DATABASE_URL=sqlite:///var/lib/claude-queue/data/claude-queue.db"
        fi
    ) >.env.new
    chmod 600 .env.new
    mv .env.new .env
    echo "Wrote .env with a new API key."
fi

claude=$(setting CLAUDE_CLI_PATH)
if [ -z "$claude" ]; then
    scripts/install-claude.sh
    claude=$PWD/tools/claude/node_modules/.bin/claude
fi
claude=$(reachable "$claude")
export CLAUDE_CLI_PATH="$claude"

# Found out before the build, which takes minutes; the service looks again.
if [ -z "$(setting ANTHROPIC_API_KEY)$(setting CLAUDE_CODE_OAUTH_TOKEN)$(setting ANTHROPIC_AUTH_TOKEN)" ]; then
    config=$(setting CLAUDE_CONFIG_DIR)
    if ! (
        [ -z "$config" ] || export CLAUDE_CONFIG_DIR="$config"
        export CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC=1 DISABLE_AUTOUPDATER=1
        as_worker "$claude" auth status </dev/null >/dev/null 2>&1
    ); then
        cat >&2 <<END
No Anthropic credential was found. Give one of these, then run make up again:
    an API key      echo ANTHROPIC_API_KEY=sk-ant-… >> .env
    a token         $claude setup-token
                    echo CLAUDE_CODE_OAUTH_TOKEN=… >> .env
    a login         $claude auth login   (as the user that runs the worker: ${WORKER_USER:-$(id -un)})
Without an account: make demo runs a job with simulated answers.
END
        exit 1
    fi
fi

echo "Building …"
cargo build --release -p cli
exec cargo run --release --quiet -p cli -- up "$@"
