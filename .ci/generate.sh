#!/usr/bin/env bash
# Generates services/contracts from proto/: generate.sh [--check] [component ...]   (safe to run concurrently)
set -euo pipefail
cd "$(dirname "$0")/.."
exec .venv/bin/python .ci/generate.py "$@"
