#!/bin/sh
# Says how to get Rust when it is missing, before anything else is installed for nothing.
set -eu
if ! command -v cargo >/dev/null; then
    echo "Rust is missing (no cargo on the PATH). Install it from https://rustup.rs, then run this again." >&2
    exit 1
fi
