#!/bin/sh
# Puts the Python libraries of the tests into tools/python/venv, if they aren't there yet.
# Prints nothing when there is nothing to do.
set -eu
cd "$(dirname "$0")/../tools/python"
venv=venv

is_there() {
    [ -x "$venv/bin/python" ] && cmp -s requirements.txt "$venv/installed"
}

is_there && exit 0
# Two commands at once install them once.
exec 9<requirements.txt
flock 9
is_there && exit 0

../../scripts/install-debian.sh python
echo "Installing the Python libraries of the tests …"
python3 -m venv --clear "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --requirement requirements.txt
cp requirements.txt "$venv/installed"
