"""The proof's runner with real workers and a real mesh: what is finished when it is killed is not made again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.benchmarks.growth import command
from tests.infrastructure.processes import ROOT

_SECONDS = 200
_SCRIPT = """
import sys
from pathlib import Path
from tests.benchmarks.growth.arms import units
from tests.benchmarks.growth.protocol import GROWTH, miniature
from tests.benchmarks.growth.records import Records
from tests.benchmarks.growth.runner import Runner

protocol = miniature(GROWTH)
wanted = [unit for unit in units(protocol) if unit.entry == "digits" and unit.arm in ("host", "tamiyo")]
runner = Runner(protocol, Records(Path(sys.argv[1])), Path("nowhere"), smoke=True)
runner.run(wanted)
assert not runner.failed, runner.failed
"""


def start(folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _SCRIPT, str(folder)], cwd=ROOT, start_new_session=True)


@pytest.mark.timeout(2 * _SECONDS)
def test_a_killed_runner_goes_on_where_it_was(tmp_path: Path) -> None:
    runner, deadline = start(tmp_path), time.monotonic() + _SECONDS
    try:
        while len(list(tmp_path.glob("*.json"))) < 1:
            assert runner.poll() is None, "it ended before its first run did"
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children = psutil.Process(runner.pid).children(recursive=True)
    finally:
        os.kill(runner.pid, signal.SIGKILL)
        runner.wait()
    first = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.json")}
    assert 1 <= len(first) < 4
    _, left = psutil.wait_procs(children, timeout=30)
    assert not left, "a worker or a service outlived its runner"
    assert start(tmp_path).wait(_SECONDS) == 0
    records = {path.name: json.loads(path.read_bytes()) for path in tmp_path.glob("*.json")}
    assert set(records) == {f"digits.{arm}.{seed}.json" for arm in ("host", "tamiyo") for seed in (10, 11)}
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in first} == first, "what was finished stays"
    assert all(record["test_accuracy"] is None for record in records.values()), "a miniature reads no test set"
    assert all(len(record["plans"]) == 3 for record in records.values() if record["arm"] == "tamiyo")
    assert start(tmp_path).wait(_SECONDS) == 0, "nothing is left to do"


def test_a_final_run_is_refused_until_the_protocol_is_committed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("tests.benchmarks.growth.permit.PROTOCOL_FILE", "docs/benchmarks/none.json")
    assert command.main("growth", ["--out", str(tmp_path / "growth.json")]) == 2
    assert "the test set stays shut" in capsys.readouterr().err
    assert not (tmp_path / "growth.json").exists()
