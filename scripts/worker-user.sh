# Sourced by scripts that start a worker. A worker isn't root: as root this makes the user claude-queue, unless WORKER_USER
# names another one, and exports WORKER_USER. As anybody else it does nothing.

# Runs a command as the user of the worker.
as_worker() {
    if [ "$(id -u)" -ne 0 ]; then
        "$@"
        return
    fi
    HOME=$(getent passwd "$WORKER_USER" | cut -d: -f6) \
        setpriv --reuid "$WORKER_USER" --regid "$(id -g "$WORKER_USER")" --clear-groups -- "$@"
}

# Prints a program that the worker's user can start: this one, or a copy of it.
reachable() {
    if as_worker test -x "$1"; then
        echo "$1"
        return
    fi
    copies=/usr/local/lib/claude-queue
    install -d -m 755 "$copies"
    # Put in place whole: a running program can't be written to.
    install -m 755 "$(readlink -f "$1")" "$copies/claude.new"
    mv "$copies/claude.new" "$copies/claude"
    echo "$copies/claude"
}

if [ "$(id -u)" -eq 0 ]; then
    if [ -z "${WORKER_USER:-}" ]; then
        WORKER_USER=claude-queue
        if ! getent passwd "$WORKER_USER" >/dev/null; then
            useradd --system --user-group --create-home --home-dir /var/lib/claude-queue --shell /usr/sbin/nologin "$WORKER_USER"
            echo "Made the user $WORKER_USER: a worker doesn't run as root." >&2
        fi
    fi
    export WORKER_USER
fi
