#!/usr/bin/env bash
# Bulkhead with curl and jq: store a document, ask, and read an answer as it is written.
#
#     BULKHEAD_URL=http://127.0.0.1:9000 BULKHEAD_KEY=ten_… ./bulkhead.sh handbook.md
set -euo pipefail
: "${BULKHEAD_URL:?}" "${BULKHEAD_KEY:?}"

# post PATH [CURL'S OPTIONS…] < JSON: curl comes again by itself after 429 and 503, as late as `retry-after` says. The key
# makes that safe: what was done already is answered, and not done or paid for twice. To see what an error says, leave
# --fail and --retry out.
post() {
    local path=$1 key
    shift
    key=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
    curl --silent --show-error --fail --retry 10 --retry-max-time 120 "$@" \
        --header "Authorization: Bearer $BULKHEAD_KEY" --header "Content-Type: application/json" \
        --header "Idempotency-Key: $key" --header "X-User-Id: ann" --data-binary @- "$BULKHEAD_URL$path"
}

file=$1
name=$(basename "${file%.*}")
case $file in
    *.md) kind=text/markdown ;;
    *.html) kind=text/html ;;
    *) kind=text/plain ;;
esac

# Store a file, or a new version of it. The same file again changes nothing.
jq --null-input --arg name "$name" --arg kind "$kind" --rawfile content "$file" \
    '{id: $name, title: $name, content: $content, content_type: $kind}' |
    post /v1/documents |
    jq --raw-output '.documents[0] | "stored \(.id) version \(.version): \(.status)"'

# Ask.
echo '{"message": "How many days of annual leave are there?"}' |
    post /v1/chat |
    jq --raw-output '"answer: \(.response)", "cited: \([.citations[].document_id] | join(", "))"'

# Read an answer as it is written: --no-buffer, and each event's data is a line of JSON.
printf 'stream: '
echo '{"message": "How many days may be carried over?", "stream": true}' |
    post /v1/chat --no-buffer |
    sed --unbuffered --quiet 's/^data: //p' |
    jq --raw-output --join-output --unbuffered \
        'if .text then .text elif .error then error(.error.message) elif .usage then "\ncost: \(.usage.cost_nano_usd) nano-dollars\n" else empty end'
