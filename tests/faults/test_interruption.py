"""Ctrl-C and SIGTERM: a checkpoint, nobody left behind, and a run that can be gone on with."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.infrastructure.runs import SHORT, Ended, Run, running, validation_figures
from tests.infrastructure.short_run import ShortRun, lives

pytestmark = [pytest.mark.slow, pytest.mark.timeout(240)]


def test_an_interrupted_run_is_gone_on_with_and_equals_its_twin(short_run: ShortRun, tmp_path: Path) -> None:
    """Interrupted by Ctrl-C, resumed, ended by SIGTERM, resumed: the same run as without all that."""
    with running(tmp_path, *SHORT) as run:
        run.until_epoch(3)
        run.signal(signal.SIGINT)
        ended = run.wait()
        folder = run.folder
        _check_interrupted(run, ended, 130)
    with running(tmp_path, arguments=["--resume", str(folder)]) as again:
        again.until_epoch(8)
        again.signal(signal.SIGTERM)
        ended = again.wait()
        _check_interrupted(again, ended, 143)
    with running(tmp_path, arguments=["--resume", str(folder)]) as last:
        ended = last.wait()
        assert ended.code == 0, ended.err
        assert ended.summary["status"] == "succeeded"
        assert validation_figures(last.metrics()) == validation_figures(short_run.metrics())
        assert lives(ended.summary) == lives(short_run.ended.summary)
        assert ended.summary["accuracy"]["grown"] == short_run.ended.summary["accuracy"]["grown"]
        assert last.left_over() == []


def _check_interrupted(run: Run, ended: Ended, code: int) -> None:
    assert ended.code == code, ended.err
    assert ended.summary["status"] == "interrupted"
    assert "saving a checkpoint" in ended.err
    assert f"--resume {run.folder}" in ended.err, "the way on is not told"
    assert "Traceback" not in ended.err
    steps = [int(path.name) for path in (run.folder / "checkpoints").iterdir()]
    assert max(steps) >= run.metrics()[-1]["step"], "the checkpoint is older than what was trained"
    assert run.left_over() == []
