#!/usr/bin/env bash
# Generates the Java classes from proto/ into target/generated-sources; a step of the Maven build, which has put
# protoc and protoc-gen-grpc-java into target/tools. buf comes from .venv or PATH.
set -euo pipefail
cd "$(dirname "$0")"
export PATH="$PWD/../../.venv/bin:$PATH"
command -v buf >/dev/null || { echo "generate.sh: buf is missing ('make setup' brings it)" >&2; exit 1; }
chmod +x target/tools/*
buf generate ../.. --template buf.gen.yaml
