#!/bin/sh
# Puts the pinned Claude CLI into tools/claude/node_modules, if it isn't there yet.
# Prints nothing when there is nothing to do.
set -eu
cd "$(dirname "$0")/.."
scripts=$PWD/scripts
cd tools/claude
wanted=$(sed -n 's/.*"@anthropic-ai\/claude-code": "\(.*\)".*/\1/p' package.json)
claude=node_modules/.bin/claude

is_there() {
    [ "$("$claude" --version 2>/dev/null | cut -d' ' -f1)" = "$wanted" ]
}

is_there && exit 0
# Two commands at once install it once.
exec 9<package.json
flock 9
is_there && exit 0

"$scripts/install-debian.sh" npm
echo "Installing the Claude CLI $wanted (about 400 MB on disk) …"
npm ci --no-audit --no-fund --loglevel=error
# The package's own install step puts the platform's binary in place. Where npm is set to run no such steps, run it here.
is_there || node node_modules/@anthropic-ai/claude-code/install.cjs
if ! is_there; then
    echo "The Claude CLI was installed, but $PWD/$claude doesn't say that it is $wanted:" >&2
    "$claude" --version >&2 || true
    exit 1
fi
