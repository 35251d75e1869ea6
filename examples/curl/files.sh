#!/bin/sh
# Brings a file into a session, lets a job work on it, and fetches what the job wrote. Needs curl and jq.
#
#   files.sh input.txt "Count the words of input.txt into count.txt" out
set -eu
url=${CLAUDE_QUEUE_URL:-http://127.0.0.1:8000}
ask() {
    curl --silent --show-error --fail-with-body --retry 5 --header "X-API-Key: ${CLAUDE_QUEUE_API_KEY:-}" "$@"
}

session=files-example
ask --json "{\"name\": \"$session\"}" "$url/api/v1/sessions" >/dev/null
ask --form "file=@$1" "$url/api/v1/sessions/$session/files" | jq --raw-output '"stored \(.data.path)"'
id=$(jq --null-input --arg message "$2" --arg session "$session" '{$message, $session}' |
    ask --json @- "$url/api/v1/jobs" | jq --raw-output .data.id)
while :; do
    job=$(ask "$url/api/v1/jobs/$id?wait=50")
    status=$(printf '%s' "$job" | jq --raw-output .data.status)
    case $status in done | failed | cancelled) break ;; esac
done
[ "$status" = "done" ]
# Everything at once: the workspace as an archive.
mkdir -p "$3"
ask "$url/api/v1/jobs/$id/archive" | tar -xz -C "$3"
printf '%s' "$job" | jq --raw-output '.data.result.files_changed[] | "\(.status) \(.path)"'
