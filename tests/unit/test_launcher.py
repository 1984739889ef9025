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
    arm = {"test_accuracy": 92.5, "parameters": 1880, "flops": 27424, "training_flops": 7.29e9, "seconds": 13.8}
    return {
        "accuracy": {"grown": 92.5, "host": 75.0, "bigger": 94.0},
        "arms": {"grown": {**arm, "growth_seconds": 0.7}, "host": arm},
        "growth_seconds": 0.7,
        "adaptations": {"started": 6, "fossilized": 5, "culled": 1},
        "report": "r.html",
        **changes,
    }


def test_the_result_compares_and_names_the_cost_of_growth() -> None:
    lines = result_lines(summary())
    assert lines[1].split() == ["test", "%", "parameters", "FLOPs/image", "training", "FLOPs", "seconds", "growth"]
    assert lines[2].split() == ["grown", "92.50", "1,880", "27,424", "7.29e+09", "13.8", "0.7"]
    assert lines[3].split()[-1] == "-", "what was not measured is no zero"
    assert "Growth gained +17.50 points over the same host, -1.50 against its own final shape" in lines[5]
    assert "growth took 0.7 s of the grown network's time: scoring, counterfactuals, surgery" in lines
    assert "seeds: 6 started, 5 fossilized, 1 culled" in lines
    assert lines[-1] == "report: r.html"


def test_no_gain_is_said_plainly() -> None:
    lines = result_lines(summary(accuracy={"grown": 74.0, "host": 75.0, "bigger": None}))
    assert "No gain from growth: -1.00 points against the same host." in lines


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
