"""Each benchmark runs for real, tiny: its JSON has its form and its control ran. Timings are never asserted."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import adaptation_stall, control_load, dormant, measure, numbers, startup
from tests.infrastructure.processes import ROOT
from tests.infrastructure.runs import SERVICES
from tests.integration.trainer_harness import WIDEN

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(300)]


def result_of(module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What the benchmark wrote; it printed a table too."""
    out = tmp_path / "result.json"
    assert module.main(["--out", str(out), *arguments]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 3
    result: dict[str, Any] = json.loads(out.read_text())
    assert len(result["method"]) > 200
    return result


def test_a_change_is_found_between_pairs_and_none_where_there_is_none() -> None:
    drifting = [(float(level), float(level + 1)) for level in range(100, 120)]
    pairs = [((low, low, high), (1.1 * low, 1.1 * low, 1.1 * high)) for low, high in drifting]
    slower = measure.change_percent(pairs, measure.median)
    assert slower["percent"] == pytest.approx(10.0)
    assert measure.below(9.0, slower["interval"]) is False
    assert measure.below(11.0, slower["interval"]) is True
    same = measure.change_percent([(pair[0], pair[0]) for pair in pairs], measure.p99)
    assert same["percent"] == 0.0
    assert measure.below(1.0, (-2.0, 2.0)) is None


def test_groups_that_differ_widen_the_interval() -> None:
    values = [[0.1 * value + offset for value in range(10)] for offset in (0.0, 0.0, 0.0, 0.0)]
    middle, alike = measure.nested_median(values)
    assert middle == pytest.approx(0.45)
    _, apart = measure.nested_median(
        [[value + offset for value in group] for group, offset in zip(values, (-2, -1, 1, 2), strict=True)]
    )
    assert apart[0] < alike[0] <= middle <= alike[1] < apart[1]


@pytest.mark.full
def test_control_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(control_load, tmp_path, capsys, "--turns", "4", "--window", "0.5")
    assert result["calls"]["errors"] == {}
    assert result["calls"]["calls"] == 4 * 100
    assert 0 < result["steps"]["control"] < result["steps"]["all"]
    for part in ("step_time", "step_cpu_time", "other_server", "beyond_other_server", "noise"):
        for figure in result[part].values():
            assert figure["interval"][0] <= figure["percent"] <= figure["interval"][1]
    assert result["step_time"]["median"]["pairs"] == 4
    assert result["noise"]["median"]["pairs"] == 2
    assert result["environment"]["before"]["processors"] >= 1


@pytest.mark.full
def test_startup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(startup, tmp_path, capsys, "--starts", "1")
    assert set(result["services_serving_after_seconds"]) == set(SERVICES)
    assert set(result["training_process_seconds"]) == {"torch", "data", "waited"}
    assert result["control_seconds"]["least"] > 0
    assert result["first_step_seconds"]["least"] > max(result["services_serving_after_seconds"].values())


def test_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = result_of(numbers, tmp_path, capsys, "--seconds", "0.5", "--calls", "10", "--epochs", "45")
    found = {number["name"]: number for number in result["numbers"]}
    assert len(found) == len(result["numbers"]) >= 14
    for number in found.values():
        assert (number["value"] is None) == (number["holds"] is None)
        assert len(number["method"]) > 20
    # These are no timings: they hold on any machine.
    assert found["rollback, exact"]["value"] == 100
    assert found["drift of untouched layers"]["value"] == 0
    assert found["dormant overhead"]["value"] is None


def test_dormant(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dormant, "DIGITS", dataclasses.replace(dormant.DIGITS, turn_epochs=1))
    result = result_of(dormant, tmp_path, capsys, "--starts", "2", "--rounds", "2", "--epochs", "2")
    # No timing either: a run without growth is the plain loop, to the last bit.
    assert result["different"] == []
    assert result["bit_identical"] is True
    assert result["tensors"] > 20
    assert result["case"] == "digits"
    assert set(result["cpu_ms_per_step"]) == {"bare", "again", "off", "deciding"}
    for key, interval in (
        ("overhead_percent", "interval"),
        ("overhead_percent_deciding", "interval_deciding"),
        ("noise_percent", "interval_noise"),
    ):
        assert result[interval][0] <= result[key] <= result[interval][1]


def test_resume_exactness(tmp_path: Path) -> None:
    # In a process of its own: it forks, and this one has threads.
    out = tmp_path / "result.json"
    command = [sys.executable, "-m", "tests.benchmarks.resume_exactness", "--out", str(out), "--kills", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert [kill for kill in result["kills"] if kill["different"]] == []
    assert (result["exact"], result["of"], result["holds"]) == (5, 5, True)
    assert len(result["states"]) >= 5


def test_steps_in_flight_are_paired_with_idle_ones_of_the_same_place() -> None:
    """Ten epochs of four steps of 10 ms; in the sixth a kernel is on its way, and one of its steps stands still."""
    steps = [
        {"step": n + 1, "began": 0.01 * n, "seconds": 0.01, "cpu_seconds": 0.01, "gap_seconds": 0.0} for n in range(40)
    ]
    story = [("GERMINATED", 5, 0.2), ("LOADING", 5, 0.235), ("EVALUATING", 5, 0.235), ("CULLED", 7, 0.28)]
    lines = [
        {"kind": "transition", "seed": "seed-1", "to_state": state, "epoch": epoch, "time": moment}
        for state, epoch, moment in story
    ]
    busy = adaptation_stall.busy_epochs(lines)
    (pair,) = adaptation_stall.pair(steps, adaptation_stall.windows(lines), busy, per_epoch=4)
    assert [step["step"] for step in pair.steps] == [21, 22, 23]
    assert [step["step"] for step in pair.idle] == [17, 18, 19]
    assert [step["step"] for step in pair.other_idle] == [13, 14, 15]
    (alike,) = adaptation_stall.pair(steps, adaptation_stall.windows(lines), busy, per_epoch=4, decided={1, 3, 5})
    assert [step["step"] for step in alike.idle] == [13, 14, 15]
    assert [step["step"] for step in alike.other_idle] == [5, 6, 7]
    assert adaptation_stall.pair(steps, adaptation_stall.windows(lines), busy, per_epoch=4, decided={3, 5}) == []
    between_steps = adaptation_stall.Window(0.201, 0.202)
    assert adaptation_stall.pair(steps, [between_steps], busy, per_epoch=4) == []
    assert adaptation_stall.waited([pair]) == []
    steps[21]["gap_seconds"] = 0.031
    assert [step["step"] for step in adaptation_stall.waited([pair])] == [22]
    cancelled = [*lines[:1], {**lines[0], "to_state": "CANCELLED"}]
    assert adaptation_stall.windows(cancelled) == []


@pytest.mark.full
def test_a_live_run_has_windows_and_other_work(tmp_path: Path) -> None:
    """No timing: that there is something to compare, and that nothing is left of the one run when the next begins.

    Not of every trial: a decision may come too late, a kernel may be so slow that no epoch beside it is idle. Trials
    are far apart, for a machine that has other work to do.
    """
    cores = os.sched_getaffinity(0)
    trials = 4
    runs = [adaptation_stall.live(tmp_path / str(number), trials, every=32) for number in range(2)]
    assert os.sched_getaffinity(0) == cores
    found = adaptation_stall.in_flight(runs[0] + runs[1])
    assert found["windows"] == len(runs[0].pairs) + len(runs[1].pairs) >= trials
    assert found["other_work"]["windows"] >= 2
    assert found["placement"][0] == found["placement"][1]
    assert found["step_time"]["p99"]["pairs"] == found["windows"]
    assert found["after_no_decision"]["p99"]["pairs"] > 0


@pytest.mark.full
def test_a_compiler_that_is_killed_meanwhile_compiles_again(tmp_path: Path) -> None:
    """Beside another test a compiler that starts anew took nearly as long as trials are apart: no epoch was idle."""
    run = adaptation_stall.live(tmp_path, trials=2, faults=True)
    found = adaptation_stall.under_faults(run)
    assert len(run.kills) == found["cold"]["windows"] == 1
    assert found["other_work"]["windows"] == 1


def test_a_fossilized_network_is_compared_with_plain_pytorch(tmp_path: Path) -> None:
    found = adaptation_stall.fossilized(tmp_path / "run", WIDEN, "groups.1.conv1", 4, rounds=3)
    # No timing: the memory of equal networks is equal anywhere.
    assert found["memory_bytes"]["grown"] == found["memory_bytes"]["static"] > 0
    assert found["interval"][0] <= found["percent"] <= found["interval"][1]
