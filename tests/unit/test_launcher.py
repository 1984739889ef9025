"""The launcher's words: result, plan, what a resumed run refuses. Its deeds: tests/integration/test_main_entrypoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from services.chassis.config.loader import load_config
from services.chassis.errors import EsperError
from services.tolaria.launcher import Launcher, Options, plan_of, refuse_changes, result_lines
from services.tolaria.run_folder import RunFolder


def summary(**changes: Any) -> dict[str, Any]:
    arm = {
        "test_accuracy": 92.5,
        "test_interval": [90.0, 95.0],
        "parameters": 1880,
        "flops": 27424,
        "training_flops": 7e9,
        "growth_flops": 2e8,
        "seconds": 13.8,
        "growth_seconds": 0.7,
    }
    better = {"points": 17.5, "low": 13.0, "high": 22.0, "confidence": 0.95, "samples": 360}
    flops = {"training": 7e9, "culled_seeds": 7e7, "discarded": 0.0, "growth": 2e8, "health": 1e8}
    return {
        "accuracy": {"grown": 92.5, "host": 75.0, "bigger": 94.0},
        "arms": {"grown": arm, "host": {**arm, "test_accuracy": 75.0, "growth_flops": 0.0, "growth_seconds": None}},
        "comparisons": {"host": better},
        "changes": [{"path": "c1", "operation": "conv2d", "before_shape": [4, 1], "after_shape": [6, 1]}],
        "flops": {**flops, "counterfactuals": 1e8, "validation": 8e8, "total": 8e9},
        "growth_seconds": 0.7,
        "budget": {"kind": "flops", "limit": 4e4, "host": 2e4, "final": 27424.0},
        "adaptations": {"started": 6, "fossilized": 5, "culled": 1},
        "report": "r.html",
        **changes,
    }


def test_the_result_opens_with_the_verdict_and_names_the_cost_of_growth() -> None:
    lines = result_lines(summary())
    assert lines[1] == "Grow."
    assert lines[2].startswith("  The grown network is better than the same host without growth: +17.50 [+13.00, +22.0")
    assert lines[4] == "  The shape: c1 4 to 6."
    grown, host = lines[7:9]
    assert grown.split() == ["grown", "92.50", "[90.0,", "95.0]", "-", "1,880", "27,424", "7.2e+09", "13.8", "0.7"]
    assert host.split()[1:7] == ["75.00", "[90.0,", "95.0]", "+17.50", "[+13.00,", "+22.00]"]
    assert host.split()[-1] == "-"
    assert lines[6].index("seconds") + len("seconds") == grown.index("13.8") + len("13.8"), "columns stand in line"
    (cost,) = [line for line in lines if "8e+09 FLOPs" in line]
    assert "training 87.5% (culled seeds 0.9%, steps taken back 0.0%), measuring 1.2%, counterfactuals 1.2%" in cost
    assert cost.endswith("validation 10.0%")
    assert "growth took 0.7 s of the grown network's time: measuring, counterfactuals, surgery" in lines
    assert "seeds: 6 started, 5 fossilized, 1 culled" in lines
    assert lines[-1] == "report: r.html"


def test_a_run_without_growth_does_not_speak_of_what_growth_cost() -> None:
    lines = result_lines(summary(growth_seconds=None))
    assert "8e+09 FLOPs: training 87.5% (steps taken back 0.0%), validation 10.0%" in lines
    assert not [line for line in lines if "growth took" in line or "counterfactuals" in line]


def test_no_gain_is_said_plainly() -> None:
    worse = {"points": -1.0, "low": -4.0, "high": 2.0, "confidence": 0.95, "samples": 360}
    lines = result_lines(summary(comparisons={"host": worse}, start_accuracy=75.25, changes=[]))
    assert lines[1] == "No gain shown."
    assert "is not shown to be better than the trained host trained on: -1.00 [-4.00, +2.00] points" in lines[2]
    assert lines[3] == ""
    assert "before the first step the trained host stood at 75.25 % on the validation split" in lines


def test_a_run_that_told_nothing() -> None:
    nothing = {"started": None, "fossilized": None, "culled": None}
    accuracy = {"grown": None, "host": None, "bigger": None}
    assert result_lines({"accuracy": accuracy, "adaptations": nothing, "report": None}) == []


def test_the_plan_names_the_budget() -> None:
    config = load_config(
        None, overrides=["growth.budget={parameters: 3}", "services.urza.address=h:1"], environ={}
    ).config
    plan = plan_of(config)
    assert "start oona, tamiyo" in plan
    assert "at most 3 times the host's parameters" in plan


def test_a_resumed_run_takes_the_same_words_again_and_no_others() -> None:
    run = load_config(None, overrides=["training.epochs=5"], environ={}).config
    same = load_config(None, overrides=["training.epochs=5", "run.name=x"], environ={})
    refuse_changes(same, run)
    other = load_config(None, overrides=["training.epochs=6", "data.data_dir=d"], environ={})
    with pytest.raises(EsperError, match=r"data.data_dir is null, not d; training.epochs is 5, not 6"):
        refuse_changes(other, run)


def test_a_message_of_a_kind_it_does_not_know_is_passed_over(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(None, overrides=[f"run.output_dir={tmp_path}"], environ={}).config
    folder = RunFolder.create(config, stem="x")
    launcher = Launcher(folder, config, Options(), resume=False)
    launcher._hear({"kind": "of tomorrow", "what": 1})
    assert capsys.readouterr().out == ""
    folder.close()
