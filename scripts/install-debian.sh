#!/bin/sh
# Makes sure that programs are there: as root it installs their Debian packages, otherwise it says which are missing.
# Usage: install-debian.sh PROGRAM…   with PROGRAM one of cc, bwrap, curl, jq, npm, pgbouncer, postgres, python.
# Prints nothing when there is nothing to do.
set -eu

is_there() {
    case $1 in
        # Debian keeps the server's programs off the path.
        postgres)
            for initdb in "$(command -v initdb || true)" /usr/lib/postgresql/*/bin/initdb; do
                [ -x "$initdb" ] && return 0
            done
            return 1
            ;;
        pgbouncer) command -v pgbouncer >/dev/null || [ -x /usr/sbin/pgbouncer ] ;;
        python) python3 -c "import ensurepip, venv" 2>/dev/null ;;
        npm) command -v npm >/dev/null && command -v node >/dev/null ;;
        *) command -v "$1" >/dev/null ;;
    esac
}

package_of() {
    case $1 in
        cc) echo "gcc libc6-dev" ;;
        bwrap) echo "bubblewrap" ;;
        curl) echo "curl" ;;
        jq) echo "jq" ;;
        npm) echo "nodejs npm" ;;
        pgbouncer) echo "pgbouncer" ;;
        postgres) echo "postgresql" ;;
        python) echo "python3 python3-venv" ;;
        *)
            echo "install-debian.sh doesn't know the program $1" >&2
            exit 2
            ;;
    esac
}

programs="" packages=""
for program in "$@"; do
    if ! is_there "$program"; then
        programs="$programs $program"
        packages="$packages $(package_of "$program")"
    fi
done
[ -n "$programs" ] || exit 0

if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "Missing:$programs. Install what has them, then run this again; on Debian:" >&2
    echo "    sudo apt-get update && sudo apt-get install --no-install-recommends$packages" >&2
    exit 1
fi
echo "Installing the Debian packages$packages …"
log=$(mktemp)
trap 'rm -f "$log"' EXIT
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086 # One word each.
if ! { apt-get update -q && apt-get install -q -y --no-install-recommends $packages; } >"$log" 2>&1; then
    tail -n 20 "$log" >&2
    echo "The packages$packages could not be installed; the last lines above say why." >&2
    exit 1
fi
for program in $programs; do
    if ! is_there "$program"; then
        echo "The packages$packages are installed, but $program isn't there." >&2
        exit 1
    fi
done
