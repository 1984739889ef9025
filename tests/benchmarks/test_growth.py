"""The proof's runner with real workers and a real mesh: what is finished when it is killed is not made again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

import psutil
import pytest

from tests.benchmarks.growth import command
from tests.benchmarks.growth.arms import Unit
from tests.benchmarks.growth.protocol import GROWTH, miniature
from tests.benchmarks.growth.records import Records
from tests.benchmarks.growth.runner import Runner
from tests.infrastructure.processes import ROOT

pytestmark = pytest.mark.parallel

_SECONDS = 200
_SCRIPT = """
import sys
from pathlib import Path
from tests.benchmarks.test_growth import WANTED, runner

made = runner(Path(sys.argv[1]))
made.run(WANTED)
assert not made.failed, made.failed
"""
#: One run without growth, which is done first, and two that differ in nothing but their learning rate.
WANTED: Final = (Unit("digits", "host", 10), Unit("digits", "tamiyo", 10, 0.3), Unit("digits", "tamiyo", 10, 0.6))


def runner(folder: Path) -> Runner:
    return Runner(miniature(GROWTH), Records(folder), Path("nowhere"), smoke=True)


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _SCRIPT, str(folder)], cwd=ROOT, start_new_session=True)


@pytest.mark.timeout(2 * _SECONDS)
def test_a_killed_runner_goes_on_where_it_was(tmp_path: Path) -> None:
    process, deadline = start(tmp_path), time.monotonic() + _SECONDS
    try:
        while len(list(tmp_path.glob("*.json"))) < 1:
            assert process.poll() is None, "it ended before its first run did"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(process.pid).children(recursive=True)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    first = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert 1 <= len(first) < len(WANTED)
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left, "a worker or a service outlived its runner"
    assert start(tmp_path).wait(_SECONDS) == 0
    records = {path.name: json.loads(path.read_bytes()) for path in tmp_path.glob("*.json")}
    assert set(records) == {f"{unit.name}.json" for unit in WANTED}
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in first} == first, "what was finished stays"
    assert all(record["test_accuracy"] is None for record in records.values()), "a miniature reads no test set"
    assert all(len(record["plans"]) == 3 for record in records.values() if record["arm"] == "tamiyo")
    nothing = runner(tmp_path / "elsewhere")
    nothing.run(WANTED, deadline=0)
    assert not (tmp_path / "elsewhere").exists()
    again = runner(tmp_path)
    again.run(WANTED)
    assert not again.failed, "nothing is left to do"
    assert {path.name for path in tmp_path.glob("*.json")} == set(records)


def test_a_final_run_is_refused_until_the_protocol_is_committed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tests.benchmarks.growth.permit.PROTOCOL_FILE", "docs/benchmarks/none.json")
    assert command.main("growth", ["--out", str(tmp_path / "growth.json")]) == 2
    assert "the test set stays shut" in capsys.readouterr().err
    assert not (tmp_path / "growth.json").exists()
