#!/usr/bin/env bash
# Stops the broker that start.sh left running: stop.sh [--data DIR]. In order first, by force after 20 s.
set -euo pipefail
data=$(cd "$(dirname "$0")/../.." && pwd)/.tools/kafka/data
case "${1:-}" in
    --data) data=${2:?} ;;
    '') ;;
    *) echo "usage: stop.sh [--data DIR]" >&2; exit 2 ;;
esac
alive() { kill -0 "$1" 2>/dev/null && ! grep -qs '^State:.*Z' "/proc/$1/status"; }
pid=$(cat "$data/kafka.pid" 2>/dev/null) || { echo "kafka: not running on $data"; exit 0; }
kill -TERM "$pid" 2>/dev/null || true
for _ in $(seq 200); do
    alive "$pid" || break
    sleep 0.1
done
if alive "$pid"; then
    kill -KILL "$pid"
    echo "kafka: ended by force"
else
    echo "kafka: stopped"
fi
rm -f "$data/kafka.pid"
