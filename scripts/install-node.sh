#!/bin/sh
# Puts the npm libraries of the tests into tools/node/node_modules, if they aren't there yet.
# Prints nothing when there is nothing to do.
set -eu
cd "$(dirname "$0")/../tools/node"

is_there() {
    cmp -s package-lock.json node_modules/installed
}

is_there && exit 0
# Two commands at once install them once.
exec 9<package.json
flock 9
is_there && exit 0

../../scripts/install-debian.sh npm
echo "Installing the npm libraries of the tests …"
npm ci --no-audit --no-fund --loglevel=error
cp package-lock.json node_modules/installed
