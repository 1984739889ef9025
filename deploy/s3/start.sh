#!/usr/bin/env bash
# Starts an own store with the S3 protocol on the loopback interface (versitygw): objects are files below DIR.
#
#   start.sh --data DIR [--port 7070] [--bucket esper] [--foreground | --until-eof]
#   start.sh --stop --data DIR
#   start.sh --find            only prints the path of the program
#
# Whoever calls needs the keys in DIR/credentials (`set -a; . DIR/credentials`), which are drawn at random the first
# time. It comes back when the store answers and leaves it running (--foreground and --until-eof as in
# deploy/kafka/start.sh). Exit codes: 0, 1 it did not start, 2 usage, 3 versitygw is missing.
set -euo pipefail

port=7070 data='' bucket=esper mode=background deadline=30
usage() { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
find_program() {
    local own
    own="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)/.tools/bin/versitygw"
    if [ -x "$own" ]; then echo "$own"; return; fi
    command -v versitygw && return
    echo "s3: versitygw is missing (go install github.com/versity/versitygw/cmd/versitygw@v1.8.0)" >&2
    exit 3
}
while [ $# -gt 0 ]; do
    case "$1" in
        --port) port=${2:?}; shift ;;
        --data) data=${2:?}; shift ;;
        --bucket) bucket=${2:?}; shift ;;
        --foreground) mode=foreground ;;
        --until-eof) mode=until-eof ;;
        --stop) mode=stop ;;
        --find) find_program; exit 0 ;;
        *) usage ;;
    esac
    shift
done
[ -n "$data" ] || usage
if [ "$mode" = stop ]; then
    if [ -f "$data/pid" ]; then
        kill "$(cat "$data/pid")" 2>/dev/null || true
        rm -f "$data/pid"
    fi
    exit
fi
program=$(find_program)
mkdir -p "$data/objects/$bucket" "$data/metadata"
data=$(cd "$data" && pwd)
if [ ! -f "$data/credentials" ]; then
    secret=$(od -An -N24 -tx1 /dev/urandom | tr -d ' \n')
    (umask 077 && printf 'AWS_ACCESS_KEY_ID=esper\nAWS_SECRET_ACCESS_KEY=%s\n' "$secret" >"$data/credentials")
fi
. "$data/credentials"

# Metadata beside the objects: not every file system has extended attributes.
ROOT_ACCESS_KEY=$AWS_ACCESS_KEY_ID ROOT_SECRET_KEY=$AWS_SECRET_ACCESS_KEY \
    setsid "$program" --port "127.0.0.1:$port" --quiet posix --sidecar "$data/metadata" "$data/objects" \
    </dev/null >"$data/server.log" 2>&1 &
server=$!
echo "$server" >"$data/pid"
end() { kill "$server" 2>/dev/null || true; wait "$server" 2>/dev/null || true; rm -f "$data/pid"; }
trap 'end; exit 0' INT TERM HUP
ends=$((SECONDS + deadline))
until (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do
    if ! kill -0 "$server" 2>/dev/null || [ "$SECONDS" -ge "$ends" ]; then
        echo "s3: did not start:" >&2
        tail -n 20 "$data/server.log" >&2
        end
        exit 1
    fi
    sleep 0.1
done
echo "s3: ready on 127.0.0.1:$port (bucket $bucket, data in $data)"
case "$mode" in
    background) trap - INT TERM HUP ;;
    foreground) wait "$server" ;;
    until-eof)
        cat >/dev/null <&0 &
        wait $!
        end
        ;;
esac
