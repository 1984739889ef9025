"""Step times: written only where asked for, complete, and never in the way of training."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.tolaria.step_times import STEP_TIMES_FILE, StepTimes
from tests.infrastructure.runs import json_lines
from tests.integration.trainer_harness import Harness, config_of


@pytest.mark.parametrize("asked", [True, False])
def test_a_trainer_writes_each_step_if_asked(tmp_path: Path, asked: bool) -> None:
    trainer = Harness(tmp_path, config_of(training={"epochs": 2}, telemetry={"step_times": asked})).trainer(grow=False)
    trainer.train()
    lines = json_lines(tmp_path / STEP_TIMES_FILE)
    assert [line["step"] for line in lines] == (list(range(1, trainer.total_steps + 1)) if asked else [])
    for line in lines:
        assert line["arm"] == "grown"
        assert line["seconds"] > 0
        first_of_epoch = (line["step"] - 1) % trainer.batches.per_epoch == 0
        assert (line["gap_seconds"] is None) is first_of_epoch
    assert [line["began"] for line in lines] == sorted(line["began"] for line in lines)


def test_a_file_that_cannot_be_written_does_not_stop_training(tmp_path: Path) -> None:
    (tmp_path / STEP_TIMES_FILE).mkdir()
    times = StepTimes(tmp_path, "grown")
    times.begin()
    times.end(1)
    times.flush()
    assert (tmp_path / STEP_TIMES_FILE).is_dir()
