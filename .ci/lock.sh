#!/usr/bin/env bash
# Writes requirements/lock.txt and bootstrap.txt: exact versions with hashes, for every platform, without addresses.
#   lock.sh [uv argument...]   e.g. --upgrade, --upgrade-package torch
set -euo pipefail
cd "$(dirname "$0")/.."
lock=(.venv/bin/uv pip compile --quiet --universal --python-version 3.11
    --generate-hashes --no-header --no-emit-index-url --no-annotate)
"${lock[@]}" "$@" requirements/runtime.in requirements/dev.in -o requirements/lock.txt
# uv is installed by pip, with a hash; everything else by uv.
grep -o '^uv==[^ ]*' requirements/lock.txt | "${lock[@]}" - -o requirements/bootstrap.txt
