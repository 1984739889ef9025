#!/usr/bin/env bash
# Starts one real Kafka broker (KRaft, one node, loopback only).
#
#   start.sh [--port 9092] [--controller-port PORT+1] [--data DIR] [--foreground | --until-eof]
#   start.sh --fetch-only      only brings the jars (Maven, once)
#
# It comes back when the broker serves, and leaves it running; stop.sh ends it. With --foreground it stays until
# Ctrl-C or SIGTERM and takes the broker along; with --until-eof it also ends when its standard input does, so that a
# test that dies leaves no broker behind. The data folder (default .tools/kafka/data) keeps the log, kafka.pid
# (the broker) and broker.log; a second start on it goes on with the data, after a kill -9 too.
# Exit codes: 0, 1 the broker did not start (the end of its log is shown), 2 usage, 3 Java or Maven is missing.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
home=$root/.tools/kafka

port=9092 controller_port='' data=$home/data mode=background deadline=${KAFKA_START_SECONDS:-60}
usage() { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case "$1" in
        --port) port=${2:?}; shift ;;
        --controller-port) controller_port=${2:?}; shift ;;
        --data) data=${2:?}; shift ;;
        --foreground) mode=foreground ;;
        --until-eof) mode=until-eof ;;
        --fetch-only) mode=fetch ;;
        *) usage ;;
    esac
    shift
done
controller_port=${controller_port:-$((port + 1))}

fetch() {
    local wanted
    wanted=$(sha256sum <"$here/pom.xml")
    if [ -f "$home/stamp" ] && [ "$(cat "$home/stamp")" = "$wanted" ]; then return; fi
    command -v mvn >/dev/null || { echo "kafka: Maven is missing, it brings the broker's jars (Debian: apt-get install maven)" >&2; exit 3; }
    echo "kafka: fetching the broker's jars with Maven"
    rm -rf "$home/libs"
    mkdir -p "$home"
    mvn -B -q -f "$here/pom.xml" dependency:copy-dependencies "-DoutputDirectory=$home/libs" >"$home/fetch.log" 2>&1 ||
        { echo "kafka: Maven could not fetch them:" >&2; tail -n 20 "$home/fetch.log" >&2; exit 1; }
    printf '%s' "$wanted" >"$home/stamp"
}

command -v java >/dev/null || { echo "kafka: Java is missing (Debian: apt-get install openjdk-17-jre-headless)" >&2; exit 3; }
fetch
[ "$mode" = fetch ] && exit 0

# A killed process that nobody has waited for yet (a zombie) still answers kill -0.
alive() { kill -0 "$1" 2>/dev/null && ! grep -qs '^State:.*Z' "/proc/$1/status"; }

mkdir -p "$data"
data=$(cd "$data" && pwd)
if [ -f "$data/kafka.pid" ] && alive "$(cat "$data/kafka.pid")"; then
    echo "kafka: already running on $data (process $(cat "$data/kafka.pid"))" >&2
    exit 1
fi
cat >"$data/server.properties" <<PROPERTIES
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:$controller_port
listeners=PLAINTEXT://127.0.0.1:$port,CONTROLLER://127.0.0.1:$controller_port
advertised.listeners=PLAINTEXT://127.0.0.1:$port
controller.listener.names=CONTROLLER
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT
log.dirs=$data/log
# One node: nothing can be replicated.
offsets.topic.replication.factor=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
# 50 partitions of offsets are for clusters; they cost a second at the first consumer.
offsets.topic.num.partitions=4
transaction.state.log.num.partitions=4
group.initial.rebalance.delay.ms=0
# After a kill -9 the node is let in again only when its former session has ended: 9 s by default.
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=500
# Esper creates its topics, with their settings.
auto.create.topics.enable=false
PROPERTIES

kafka() { java -Xms64m "$@"; }
if [ ! -f "$data/log/meta.properties" ]; then
    id=$(kafka -cp "$home/libs/*" kafka.tools.StorageTool random-uuid 2>/dev/null)
    kafka -cp "$home/libs/*" kafka.tools.StorageTool format -t "$id" -c "$data/server.properties" >"$data/format.log" 2>&1 ||
        { echo "kafka: could not format $data:" >&2; tail -n 5 "$data/format.log" >&2; exit 1; }
fi

# A process group of its own, so that Ctrl-C in the terminal reaches this script alone, which ends the broker in order.
: >"$data/broker.log"
setsid nohup java -Xms128m -Xmx512m -XX:+UseSerialGC -Djava.awt.headless=true \
    "-Dlog4j2.configurationFile=$here/log4j2.properties" -cp "$home/libs/*" \
    kafka.Kafka "$data/server.properties" >"$data/broker.log" 2>&1 </dev/null &
broker=$!
echo "$broker" >"$data/kafka.pid"

end() { kill -TERM "$broker" 2>/dev/null || true; wait "$broker" 2>/dev/null || true; rm -f "$data/kafka.pid"; }
trap 'end; exit 1' INT TERM HUP

until grep -q 'Kafka Server started' "$data/broker.log"; do
    if ! alive "$broker"; then
        echo "kafka: the broker ended at once:" >&2
        tail -n 20 "$data/broker.log" >&2
        rm -f "$data/kafka.pid"
        exit 1
    fi
    if [ "$SECONDS" -ge "$deadline" ]; then
        echo "kafka: not ready after $deadline s:" >&2
        tail -n 20 "$data/broker.log" >&2
        end
        exit 1
    fi
    sleep 0.1
done
echo "kafka: ready on 127.0.0.1:$port (process $broker, data in $data)"

trap 'end; exit 0' INT TERM HUP
case "$mode" in
    background) trap - INT TERM HUP ;;
    foreground) wait "$broker" ;;
    until-eof)
        # `cat` ends with the pipe's last writer; the broker's own end does not matter to it: a test may restart it.
        cat >/dev/null <&0 &
        wait $!
        end
        ;;
esac
