#!/bin/sh
# Puts the TypeScript compiler and what makes clients from OpenAPI documents into tools/typescript/node_modules, if they
# aren't there yet. Prints nothing when there is nothing to do.
set -eu
cd "$(dirname "$0")/../tools/typescript"

is_there() {
    [ -x node_modules/.bin/tsc ] && cmp -s package-lock.json node_modules/installed
}

is_there && exit 0
# Two commands at once install them once.
exec 9<package.json
flock 9
is_there && exit 0

../../scripts/install-debian.sh npm
echo "Installing the TypeScript tools of the tests …"
npm ci --ignore-scripts --no-audit --no-fund --loglevel=error
cp package-lock.json node_modules/installed
