#!/usr/bin/env bash
# Starts an own PostgreSQL on the loopback interface: own port, own data and socket folder, nothing of the system's.
#
#   start.sh --data DIR [--port 5433] [--foreground | --until-eof] [-- SERVER OPTION...]
#   start.sh --stop --data DIR
#   start.sh --find            only prints the folder of PostgreSQL's programs
#
# User and database are both `esper`, without a password on loopback. It comes back when the server accepts
# connections and leaves it running (--foreground and --until-eof as in deploy/kafka/start.sh). PostgreSQL refuses to
# run as root: there it runs as the user `postgres`, so that DIR must lie where that user may enter.
# Exit codes: 0, 1 it did not start, 2 usage, 3 PostgreSQL is missing.
set -euo pipefail

port=5433 data='' mode=background deadline=30
usage() { sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2; }
find_programs() {
    local folder
    # Debian keeps initdb and postgres off PATH, one folder a version: the newest wins.
    for folder in $(ls -d /usr/lib/postgresql/*/bin 2>/dev/null | sort -rV) ${PATH//:/ }; do
        if [ -x "$folder/initdb" ] && [ -x "$folder/postgres" ]; then echo "$folder"; return; fi
    done
    echo "postgres: PostgreSQL is missing (Debian: apt-get install postgresql)" >&2
    exit 3
}
while [ $# -gt 0 ]; do
    case "$1" in
        --port) port=${2:?}; shift ;;
        --data) data=${2:?}; shift ;;
        --foreground) mode=foreground ;;
        --until-eof) mode=until-eof ;;
        --stop) mode=stop ;;
        --find) find_programs; exit 0 ;;
        --) shift; break ;;
        *) usage ;;
    esac
    shift
done
[ -n "$data" ] || usage
programs=$(find_programs)
mkdir -p "$data"
data=$(cd "$data" && pwd)

as=()
if [ "$(id -u)" -eq 0 ]; then
    as=(runuser -u postgres --)
    chown postgres "$data"
    chmod 755 "$data"
fi
run() { (cd "$data" && "${as[@]}" "$programs/$1" "${@:2}"); }

if [ "$mode" = stop ]; then
    run pg_ctl stop --silent --mode=fast -D "$data/cluster"
    exit
fi
if [ ! -f "$data/cluster/PG_VERSION" ]; then
    run initdb --username=esper --auth=trust --encoding=UTF8 --locale=C.UTF-8 -D "$data/cluster" >"$data/initdb.log" 2>&1 ||
        { echo "postgres: could not make the cluster in $data:" >&2; tail -n 5 "$data/initdb.log" >&2; exit 1; }
fi
run pg_ctl start --silent --wait --timeout="$deadline" -D "$data/cluster" -l "$data/cluster/server.log" \
    -o "-p $port -c listen_addresses=127.0.0.1 -c unix_socket_directories='$data' $*" </dev/null ||
    { echo "postgres: did not start:" >&2; tail -n 20 "$data/cluster/server.log" >&2; exit 1; }
end() { run pg_ctl stop --silent --mode=immediate -D "$data/cluster" || true; }
trap 'end; exit 0' INT TERM HUP
run psql --quiet --host 127.0.0.1 --port "$port" --username esper --dbname postgres --command 'CREATE DATABASE esper' \
    2>"$data/create.log" || grep -q 'already exists' "$data/create.log" ||
    { cat "$data/create.log" >&2; end; exit 1; }
echo "postgres: ready on 127.0.0.1:$port (data in $data)"
case "$mode" in
    background) trap - INT TERM HUP ;;
    foreground) while run pg_ctl status -D "$data/cluster" >/dev/null; do sleep 1 & wait $!; done ;;
    until-eof)
        cat >/dev/null <&0 &
        wait $!
        end
        ;;
esac
