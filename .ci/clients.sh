#!/usr/bin/env bash
# Generates the clients from proto/ with buf and local plugins: clients.sh [--check]
# --check writes nothing and fails, naming the files, when what is committed differs.
set -euo pipefail
cd "$(dirname "$0")/.."
export PATH="$PWD/.venv/bin:$PWD/.tools/bin:$PWD/clients/typescript/node_modules/.bin:$PATH"

missing=()
for plugin in $(sed -n 's/^ *- local: //p' buf.gen.yaml); do
    command -v "$plugin" >/dev/null || missing+=("$plugin")
done
if [ "${#missing[@]}" -gt 0 ]; then
    echo "clients: not generated, missing: ${missing[*]} (make setup says why)" >&2
    # Whoever lacks Go or Node can still check the rest; CI can not.
    if [ "${1:-}" = --check ] && [ "${CI:-}" != true ]; then exit 0; fi
    exit 1
fi

log=$(mktemp)
trap 'rm -rf "$log" "${scratch:-}"' EXIT
case "${1:-}" in
    '')
        buf generate >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
        echo "clients: generated"
        ;;
    --check)
        scratch=$(mktemp -d)
        buf generate -o "$scratch" >"$log" 2>&1 || { cat "$log" >&2; exit 1; }
        drift=0
        for out in $(sed -n 's/^ *out: //p' buf.gen.yaml | sort -u); do
            diff --recursive --brief --exclude=__pycache__ "$scratch/$out" "$out" || drift=1
        done
        exit "$drift"
        ;;
    *) echo "usage: clients.sh [--check]" >&2; exit 2 ;;
esac
