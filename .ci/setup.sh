#!/usr/bin/env bash
# Sets up what the commands need: setup.sh python | tests
#   python  .venv with every package of requirements/lock.txt
#   tests   python, and what the tests run besides Python: Java and Maven (Kafka), PostgreSQL, Go, Node, grpcurl, versitygw (S3)
# Each step leaves a stamp and costs nothing while its inputs are unchanged. A program that is missing is
# installed where apt and the rights are there; else its absence is one line, and a failure where CI=true.
set -euo pipefail
cd "$(dirname "$0")/.."

GRPCURL=v1.9.3
PROTOC_GEN_GO=v1.36.10
VERSITYGW=v1.8.0
PROTOC_GEN_GO_GRPC=v1.5.1

say() { echo "setup: $*"; }
fail() { say "$*" >&2; exit 1; }

missing=() apt_updated=''

# stamped FILE TEXT: whether FILE holds TEXT, so that its step is done.
stamped() { [ -f "$1" ] && [ "$(cat "$1")" = "$2" ]; }

digest() { cat "$@" | sha256sum | cut -d' ' -f1; }

# at_least VERSION MINIMUM
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n 1)" = "$2" ]; }

python_environment() {
    local stamp=.venv/.esper-stamp wanted began=$SECONDS base
    wanted=$(digest requirements/bootstrap.txt requirements/lock.txt)
    if stamped "$stamp" "$wanted" && [ -x .venv/bin/python ]; then return; fi
    base=${PYTHON:-python3}
    command -v "$base" >/dev/null || fail "Python 3.11 or newer is needed: $base is not on PATH (or set PYTHON)"
    "$base" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "Python 3.11 or newer is needed, $base is $("$base" -V 2>&1 | cut -d' ' -f2) (set PYTHON to another)"
    if [ ! -x .venv/bin/python ]; then
        say "making .venv with $("$base" -V 2>&1)"
        "$base" -m venv .venv 2>/dev/null || { rm -rf .venv; install_packages python3-venv && "$base" -m venv .venv; } ||
            fail "Python's venv module is missing (Debian: apt-get install python3-venv)"
    fi
    if [ ! -x .venv/bin/uv ]; then
        say "installing uv"
        .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements/bootstrap.txt
    fi
    say "installing $(grep -c '==' requirements/lock.txt) packages (torch and its libraries are 4.5 GB: seconds from uv's cache, minutes without)"
    # Compiled once here: every process of a mesh would otherwise compile what it imports, 3 s of torch alone.
    .venv/bin/uv pip install --quiet --compile-bytecode --python .venv --require-hashes -r requirements/lock.txt
    printf '%s' "$wanted" >"$stamp"
    say "Python is ready ($((SECONDS - began)) s)"
}

# install_packages NAME...: Debian packages, where apt and the rights are there; returns 1 where not.
install_packages() {
    local as=()
    command -v apt-get >/dev/null || return 1
    if [ "$(id -u)" -ne 0 ]; then
        sudo -n true 2>/dev/null || return 1
        as=(sudo -n)
    fi
    say "installing $* with apt-get"
    if [ -z "$apt_updated" ]; then
        "${as[@]}" apt-get -qq update >/dev/null 2>&1 || return 1
        apt_updated=yes
    fi
    "${as[@]}" env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "$@" >/dev/null 2>&1
}

go_version() { go env GOVERSION 2>/dev/null | sed 's/^go//'; }
node_version() { node --version 2>/dev/null | sed 's/^v//'; }

java_version() { javac -version 2>&1 | sed 's/^javac //'; }
have_java() { command -v java >/dev/null && command -v javac >/dev/null && at_least "$(java_version)" 17; }
have_maven() { command -v mvn >/dev/null; }
have_postgresql() { deploy/postgres/start.sh --find >/dev/null; }
have_go() { command -v go >/dev/null && at_least "$(go_version)" 1.23; }
have_node() { command -v npm >/dev/null && at_least "$(node_version)" 20; }

# program NAME CHECK CONSEQUENCE PACKAGE...: installs a program unless CHECK finds it.
program() {
    local name=$1 check=$2 consequence=$3
    shift 3
    if "$check" || { install_packages "$@" && "$check"; }; then return; fi
    missing+=("$name")
    say "$name is missing: $consequence (Debian: apt-get install $*)" >&2
}

kafka_jars() {
    have_java && have_maven || return 0
    deploy/kafka/start.sh --fetch-only
}

# go_tool PACKAGE VERSION: a program of that exact version in .tools/bin.
go_tool() {
    local stamp=".tools/bin/.${1##*/}"
    if stamped "$stamp" "$2" && [ -x ".tools/bin/${1##*/}" ]; then return; fi
    say "building ${1##*/} $2"
    GOBIN="$PWD/.tools/bin" go install "$1@$2" || fail "go install $1@$2 failed"
    printf '%s' "$2" >"$stamp"
}

go_tools() {
    have_go || return 0
    mkdir -p .tools/bin
    go_tool github.com/fullstorydev/grpcurl/cmd/grpcurl "$GRPCURL"
    go_tool github.com/versity/versitygw/cmd/versitygw "$VERSITYGW"
    go_tool google.golang.org/protobuf/cmd/protoc-gen-go "$PROTOC_GEN_GO"
    go_tool google.golang.org/grpc/cmd/protoc-gen-go-grpc "$PROTOC_GEN_GO_GRPC"
}

node_modules() {
    local folder=clients/typescript wanted
    have_node && [ -f "$folder/package-lock.json" ] || return 0
    wanted=$(digest "$folder/package.json" "$folder/package-lock.json")
    if stamped .tools/node-stamp "$wanted" && [ -d "$folder/node_modules" ]; then return; fi
    say "installing the Node packages of $folder"
    npm --prefix "$folder" ci --silent --no-audit --no-fund
    printf '%s' "$wanted" >.tools/node-stamp
}

# whereabouts: of the programs on PATH; of one that is missing nothing, so that the text is another.
whereabouts() { printf '%s %s' "$(digest .ci/setup.sh)" "$(command -v java javac mvn go node npm || true)"; }

# programs: looks for all of them, and remembers where they were: asking each for its version takes most of a second.
programs() {
    local stamp=.tools/programs-stamp
    if stamped "$stamp" "$(whereabouts)"; then return; fi
    program "Java 17" have_java "the tests on a Kafka broker and of the Java client cannot run" default-jdk-headless
    program "Maven" have_maven "the tests on a Kafka broker and of the Java client cannot run" maven
    program "PostgreSQL" have_postgresql "the tests on PostgreSQL cannot run" postgresql
    program "Go 1.23" have_go "the tests with grpcurl, on S3 and of the Go client cannot run" golang-go
    program "Node 20" have_node "the tests of the TypeScript client cannot run" nodejs npm
    if [ "${#missing[@]}" -eq 0 ]; then
        whereabouts >"$stamp"
    fi
}

test_programs() {
    programs
    kafka_jars
    go_tools
    node_modules
    if [ "${#missing[@]}" -gt 0 ] && [ "${CI:-}" = true ]; then
        fail "CI=true and ${#missing[@]} missing: $(printf '%s, ' "${missing[@]}" | sed 's/, $//')"
    fi
}

mkdir -p .tools
# Two commands at once set up one after the other.
exec 9>.tools/setup.lock
flock 9
case "${1:-}" in
    python) python_environment ;;
    tests) python_environment; test_programs ;;
    *) echo "usage: setup.sh python|tests" >&2; exit 2 ;;
esac
