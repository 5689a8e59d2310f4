#!/usr/bin/env bash
# Bulkhead with curl and jq: upload a file, ask, and read an answer as it is written.
#
#     BULKHEAD_URL=http://127.0.0.1:9000 BULKHEAD_KEY=ten_… ./bulkhead.sh handbook.md
set -euo pipefail
: "${BULKHEAD_URL:?}" "${BULKHEAD_KEY:?}"

# api PATH [CURL'S OPTIONS…]: curl comes again by itself after 429 and 503, as late as `retry-after` says. To see what an
# error says, leave --fail and --retry out.
api() {
    local path=$1
    shift
    curl --silent --show-error --fail --retry 10 --retry-max-time 120 "$@" \
        --header "Authorization: Bearer $BULKHEAD_KEY" --header "X-User-Id: ann" "$BULKHEAD_URL$path"
}

# post PATH [CURL'S OPTIONS…] < JSON. The key makes it safe to come again: what was done already is answered, and not done
# or paid for twice.
post() {
    api "$@" --header "Content-Type: application/json" --data-binary @- \
        --header "Idempotency-Key: $(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')"
}

file=$1
name=$(basename "${file%.*}")
case $file in
    *.md) kind=text/markdown ;;
    *.html) kind=text/html ;;
    *.csv) kind=text/csv ;;
    *.pdf) kind=application/pdf ;;
    *.docx) kind=application/vnd.openxmlformats-officedocument.wordprocessingml.document ;;
    *) kind=text/plain ;;
esac

# Upload a file as a document, or as a new version of it: past the API, to an address that is signed for this one file;
# with its headers, and no key.
begun=$(jq --null-input --arg name "$name" --arg kind "$kind" --argjson size "$(wc -c < "$file")" \
    '{id: $name, title: $name, content_type: $kind, size_bytes: $size}' | post /v1/uploads)
jq --raw-output '.headers | to_entries[] | "\(.key): \(.value)"' <<< "$begun" |
    curl --silent --show-error --fail --header @- --upload-file "$file" "$(jq --raw-output .url <<< "$begun")"

# Wait until it is found.
while
    document=$(api "/v1/documents/$(jq --raw-output '.document_id | @uri' <<< "$begun")")
    status=$(jq --raw-output .status <<< "$document")
    [ "$status" = pending ] || [ "$status" = processing ]
do
    sleep 1
done
jq --raw-output '"stored \(.id) version \(.version): \(.status)", .reason // empty' <<< "$document"
[ "$status" = ready ]

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
