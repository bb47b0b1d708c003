#!/usr/bin/env bash
# The protocol of NATS by hand, with nothing but bash. NATS_URL=nats://user:password@host:port, and then
#   prices.sh live                       every symbol's last price at once, then each change as it happens
#   prices.sh since 2026-03-02T15:00:00Z every tick that is kept since then, then each new one
#   prices.sh ask AAPL BRK.B             the current prices of these symbols
set -euo pipefail
[[ $NATS_URL =~ ^nats://([^:]+):([^@]+)@([^:/]+):([0-9]+) ]] || { echo "what is NATS_URL?" >&2; exit 1; }
user=${BASH_REMATCH[1]} password=${BASH_REMATCH[2]}
exec 3<>"/dev/tcp/${BASH_REMATCH[3]}/${BASH_REMATCH[4]}"

send() { printf '%s\r\n' "$@" >&3; }
publish() { send "PUB $1 $2 ${#3}" "$3"; } # subject, reply subject, payload

inbox=_INBOX.$RANDOM$RANDOM$RANDOM
send "CONNECT {\"verbose\":false,\"headers\":true,\"no_responders\":true,\"user\":\"$user\",\"pass\":\"$password\"}"
send "SUB $inbox.answer 1" "SUB $inbox.ticks 2"
create='"stream_name":"PRICES","config":{"filter_subject":"prices.v1.>","ack_policy":"none","deliver_subject":"'$inbox'.ticks"'
case ${1:-live} in
  live)  publish '$JS.API.CONSUMER.CREATE.PRICES' "$inbox.answer" "{$create,\"deliver_policy\":\"last_per_subject\"}}" ;;
  since) publish '$JS.API.CONSUMER.CREATE.PRICES' "$inbox.answer" \
           "{$create,\"deliver_policy\":\"by_start_time\",\"opt_start_time\":\"$2\"}}" ;;
  ask)   symbols=$(printf ',"%s"' "${@:2}")
         publish feed.v1.prices_requested "$inbox.answer" "{\"symbols\":[${symbols:1}]}" ;;
esac

while IFS=' ' read -r -u 3 command subject sid rest; do
  case ${command%$'\r'} in
    PING) send PONG ;; # who does not answer is cut off
    -ERR) echo "$subject $sid $rest" >&2; exit 1 ;;
    MSG | HMSG) # subject, sid, [reply subject,] [length of the headers,] length; the bytes; an empty line
      rest=${rest%$'\r'}
      LC_ALL=C IFS= read -r -u 3 -d '' -N "${rest##* }" message
      read -r -u 3
      case $sid$command$message in
        2*) [[ $command == MSG ]] && echo "$message" || echo "${message#*$'\r\n\r\n'}" ;;
        1HMSG*) echo "$message" >&2; exit 1 ;; # a refusal: 503 when nobody answers, or what the answerer says
        1MSG*'"error"'*) echo "$message" >&2; exit 1 ;;
        1MSG*) [[ ${1:-live} == ask ]] && { echo "$message"; exit; } ;;
      esac ;;
  esac
done
