#!/bin/sh
# Runs the prompts of a CSV file with one column `prompt`, and writes a copy with the results beside them. Needs curl and
# jq. Started again after a crash, it makes no job twice.
#
#   batch.sh prompts.csv results.csv
set -eu
url=${CLAUDE_QUEUE_URL:-http://127.0.0.1:8000}
ask() {
    curl --silent --show-error --fail-with-body --retry 5 --header "X-API-Key: ${CLAUDE_QUEUE_API_KEY:-}" "$@"
}

jobs=$(mktemp)
trap 'rm -f "$jobs"' EXIT
number=0
# One prompt a line; quotes around it are taken off.
tail -n +2 "$1" | while IFS= read -r prompt; do
    prompt=$(printf '%s' "$prompt" | sed -e 's/^"\(.*\)"$/\1/' -e 's/""/"/g')
    number=$((number + 1))
    once=$(printf '%s %s %s' "$1" "$number" "$prompt" | sha256sum | cut -d ' ' -f 1)
    jq --null-input --arg message "$prompt" '{$message}' |
        ask --header 'Content-Type: application/json' --header "Idempotency-Key: $once" --data @- "$url/api/v1/jobs" |
        jq --raw-output .data.id
done >"$jobs"
echo 'prompt,status,result,cost_usd' >"$2"
while IFS= read -r id; do
    while :; do
        job=$(ask "$url/api/v1/jobs/$id?wait=50")
        case $(printf '%s' "$job" | jq --raw-output .data.status) in done | failed | cancelled) break ;; esac
    done
    printf '%s' "$job" |
        jq --raw-output '.data | [.message, .status, (.result.content // .error), .cost] | @csv' >>"$2"
done <"$jobs"
echo "$(wc -l <"$jobs") prompts"
