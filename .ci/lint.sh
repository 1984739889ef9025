#!/usr/bin/env bash
# Checks everything that needs no run, all of it even when something fails: lint.sh
set -uo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
failed=()

# tried NAME COMMAND...: prints the command's output only when it fails; returns 1 then.
tried() {
    local name=$1 began=$SECONDS output
    shift
    if output=$("$@" 2>&1); then
        echo "lint: $name ok ($((SECONDS - began)) s)"
    else
        echo "lint: $name FAILED: $*"
        echo "$output"
        return 1
    fi
}

check() { tried "$@" || failed+=("$1"); }

# Against the last released contracts: inside v1 there are only additions (docs: CONTRIBUTING).
breaking() {
    if [ ! -f proto/baseline.binpb ]; then
        echo "proto/baseline.binpb is missing: make baseline writes it, commit it"
        return 1
    fi
    "$bin/buf" breaking --against proto/baseline.binpb
}

# It takes as long as all others together: they run beside it.
told=$(mktemp)
trap 'rm -f "$told"' EXIT
tried "mypy" "$bin/mypy" --no-error-summary >"$told" &
mypy=$!
check "ruff check" "$bin/ruff" check --quiet .
check "ruff format" "$bin/ruff" format --quiet --diff .
check "buf lint" "$bin/buf" lint
check "buf format" "$bin/buf" format --diff --exit-code
check "buf breaking" breaking
check "generated code" .ci/generate.sh --check
wait "$mypy" || failed+=("mypy")
cat "$told"

if [ "${#failed[@]}" -gt 0 ]; then
    echo "lint: failed: $(printf '%s, ' "${failed[@]}" | sed 's/, $//')"
    exit 1
fi
