#!/usr/bin/env bash
# Runs the tests: test.sh all | fast   (after setup.sh tests; arguments that follow go to pytest)
#   all   lint, every test with coverage of all processes, coverage thresholds; ends with one line a part
#   fast  the checks that take seconds and the fast tier
# A part that fails does not hide the next; the exit code is 0 only when all of them passed. Ctrl-C, TERM or HUP end all
# that was started, at once.
set -uo pipefail
# Each part leads a process group of its own, so that it can be ended as a whole, and hears SIGINT, which a script's
# background commands do not.
set -m
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python
export PATH="$PWD/.venv/bin:$PWD/.tools/bin:$PATH"
# Threads of torch and numpy beyond the two cores only fight; the tests start many processes.
export OMP_NUM_THREADS=1
# Absolute: processes of the tests run in folders of their own, and leave their part of the coverage here all the same.
export COVERAGE_FILE=$PWD/.tools/coverage/data
mkdir -p .tools/coverage
# Every process of this run carries this mark, so that one which outlives the tests is found (leftovers.py).
ESPER_TEST_RUN=$$-$(date +%s%N)
tier=${1:-all}
shift || true

verdicts=() code=0 running=''

# Parts are waited for in the background: bash hears no signal while a command is in the foreground.
interrupted() {
    trap '' INT TERM HUP
    echo "== interrupted: everything that was started ends now" >&2
    [ -z "$running" ] || kill -KILL -- "-$running" 2>/dev/null
    # What has left the group (time limits, meshes, brokers) is known by its mark; one may start another meanwhile.
    for _ in 1 2 3 4 5; do
        "$python" .ci/leftovers.py "$ESPER_TEST_RUN" 0 >/dev/null && break
    done
    exit "$1"
}
trap 'interrupted 129' HUP
trap 'interrupted 130' INT
trap 'interrupted 143' TERM

# part NAME COMMAND...
part() {
    local name=$1 began=$SECONDS
    shift
    echo "== $name"
    "$@" </dev/null & # who read the terminal from the background would be stopped
    running=$!
    if wait "$running"; then
        verdicts+=("$name: passed ($((SECONDS - began)) s)")
    else
        verdicts+=("$name: FAILED ($((SECONDS - began)) s)")
        code=1
    fi
    running=''
}

# Well within CI's own limit, so that a hang is reported by us.
limited() { ESPER_TEST_RUN=$ESPER_TEST_RUN timeout --signal=INT --kill-after=120 40m "$@"; }

# What fails is run once more, alone and said so: whole systems on a machine that is busy with something else miss
# deadlines that are theirs to keep. Twice in a row is a failure.
covered() {
    limited "$python" -m coverage run -m pytest --durations=15 "$@" && return 0
    echo "== FLAKY OR BROKEN: what failed, once more and alone"
    limited "$python" -m coverage run -m pytest --last-failed --last-failed-no-failures=none "$@"
}

coverage_report() {
    # Parts left by processes that ended in order; one that was killed leaves none.
    "$python" -m coverage combine --quiet || return 1
    "$python" -m coverage report || return 1
    "$python" -m coverage json --quiet -o .tools/coverage/report.json || return 1
    "$python" .ci/coverage_gate.py .tools/coverage/report.json
}

case "$tier" in
    all)
        "$python" -m coverage erase
        part "lint" .ci/lint.sh
        part "generated clients" .ci/clients.sh --check
        if [ $# -gt 0 ]; then
            part "tests" covered "$@"
        else
            # What holds no deadline shares the two cores: file by file in the order of the folders, so that the long
            # ones (benchmarks, integration) begin and the many short ones of tests/unit fill both cores to the end.
            part "tests two at a time" covered -m "not full" --numprocesses 2 --dist loadfile --no-loadscope-reorder
            part "tests that need the machine" covered -m full
        fi
        part "no process left behind" "$python" .ci/leftovers.py "$ESPER_TEST_RUN"
        part "coverage" coverage_report
        ;;
    fast)
        part "ruff" "$python" -m ruff check --quiet .
        part "generated code" .ci/generate.sh --check
        part "tests" limited "$python" -m pytest --numprocesses 2 --dist loadfile \
            -m "not slow and not full and not kafka and not postgres and not s3" "$@"
        part "no process left behind" "$python" .ci/leftovers.py "$ESPER_TEST_RUN"
        ;;
    *) echo "usage: test.sh all|fast [PYTEST ARGUMENT...]" >&2; exit 2 ;;
esac
echo "== summary"
printf '%s\n' "${verdicts[@]}"
exit "$code"
