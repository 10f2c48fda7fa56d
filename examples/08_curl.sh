#!/usr/bin/env bash
# The gateway with nothing but curl. That of `agentrun dev` wants no tokens, so here is one more that does:
#
#   agentrun dev
#
#   export AGENTRUN_GATEWAY_SECRET=$(openssl rand -hex 32)
#   agentrun gateway --agent echo --port 8081 &
#   AGENTRUN_GATEWAY=http://127.0.0.1:8081 examples/08_curl.sh
#
set -euo pipefail

session=${1:-curl-$(date +%s)}
api=${AGENTRUN_GATEWAY:-http://127.0.0.1:8080}/v1/sessions/$session
token=$(${AGENTRUN:-agentrun} token mint --user ada --session 'curl-*' --right read --right send --right cancel)

call=(curl --silent --show-error --max-time 60 --header "Authorization: Bearer $token")

ask() {
    "${call[@]}" --write-out '\n' "$@"
}
stream() {
    "${call[@]}" --no-buffer --header "Accept: text/event-stream" "$@"
}

echo "Send a turn. Its id is ours, so that sending it again does nothing:"
ask "$api/turns" --data '{"id": "t-1", "input": "hello"}'
ask "$api/turns" --data '{"id": "t-1", "input": "hello"}'
echo

echo "Read it as server-sent events, to its end:"
stream "$api/turns/t-1/events"

echo "The connection broke after event 2? Go on behind it:"
stream "$api/turns/t-1/events" --header "Last-Event-ID: 2"

echo "No streams in this network? Wait for the next event, 25 seconds at most; meanwhile somebody sends:"
exec 3< <(ask "$api/events?after=4&wait=25&limit=1")
ask "$api/turns" --data '{"id": "t-2", "input": "count 2 60000"}'
cat <&3
ask "$api/events?after=6&wait=25&limit=1"
echo

echo "Stop it. The receipt says where in the log it ended; who stops it again is told the same:"
ask "$api/turns/t-2/cancel" --data '{"reason": "enough"}'
ask "$api/turns/t-2/cancel" --data '{"reason": "enough"}'

# Output:
# Send a turn. Its id is ours, so that sending it again does nothing:
# {"session":"curl-1","turn":"t-1","offset":1}
# {"session":"curl-1","turn":"t-1","offset":1}
#
# Read it as server-sent events, to its end:
# retry: …
#
# id: 1
# data: {"offset":1,"time":…,"event":{"type":"turn.requested","turn":"t-1","agent":"echo","input":"hello","user":"ada"}}
#
# id: 2
# data: {"offset":2,"time":…,"event":{"type":"turn.started","turn":"t-1","attempt":1,"worker":"w1","lease":…}}
#
# id: 3
# data: {"offset":3,"time":…,"event":{"type":"text.delta","turn":"t-1","attempt":1,"text":"hello"}}
#
# id: 4
# data: {"offset":4,"time":…,"event":{"type":"turn.completed","turn":"t-1","attempt":1,"turn_offset":1,"message":{"parts":[{"type":"text","text":"hello"}]}}}
#
# The connection broke after event 2? Go on behind it:
# retry: …
#
# id: 3
# data: {"offset":3,"time":…,"event":{"type":"text.delta","turn":"t-1","attempt":1,"text":"hello"}}
#
# id: 4
# data: {"offset":4,"time":…,"event":{"type":"turn.completed","turn":"t-1","attempt":1,"turn_offset":1,"message":{"parts":[{"type":"text","text":"hello"}]}}}
#
# No streams in this network? Wait for the next event, 25 seconds at most; meanwhile somebody sends:
# {"session":"curl-1","turn":"t-2","offset":5}
# {"offset":5,"events":[{"offset":5,"time":…,"event":{"type":"turn.requested","turn":"t-2","agent":"echo","input":"count 2 60000","user":"ada"}}]}
# {"offset":7,"events":[{"offset":7,"time":…,"event":{"type":"text.delta","turn":"t-2","attempt":1,"text":"w0 "}}]}
#
# Stop it. The receipt says where in the log it ended; who stops it again is told the same:
# {"status":"cancelled","offset":8,"took":…}
# {"status":"already_ended","offset":8,"took":…}
