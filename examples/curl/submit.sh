#!/bin/sh
# Submits a job, waits for its end, and prints what came of it. Needs curl and jq.
#
#   submit.sh "Say hello."
set -eu
url=${CLAUDE_QUEUE_URL:-http://127.0.0.1:8000}
ask() {
    curl --silent --show-error --fail-with-body --retry 5 --header "X-API-Key: ${CLAUDE_QUEUE_API_KEY:-}" "$@"
}

# With the key a repeated request makes no second job.
job=$(jq --null-input --arg message "${1:-Say hello.}" '{$message}' |
    ask --header 'Content-Type: application/json' --header "Idempotency-Key: $(cat /proc/sys/kernel/random/uuid)" \
        --data @- "$url/api/v1/jobs")
id=$(printf '%s' "$job" | jq --raw-output .data.id)
echo "submitted $id"
# Each request waits up to 50 seconds for the end.
while :; do
    job=$(ask "$url/api/v1/jobs/$id?wait=50")
    status=$(printf '%s' "$job" | jq --raw-output .data.status)
    case $status in done | failed | cancelled) break ;; esac
done
printf '%s' "$job" | jq --raw-output '.data | "\(.status) for $\(.cost): \(.result.content // .error)"'
[ "$status" = "done" ]
