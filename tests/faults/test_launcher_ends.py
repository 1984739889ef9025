"""However `train.py` ends, at whatever moment, nobody is left behind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.infrastructure.runs import SERVICES, SHORT, running

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]


def test_a_killed_launcher_leaves_no_process(tmp_path: Path) -> None:
    with running(tmp_path, *SHORT, "training.epochs=500") as run:
        run.until_epoch(2)
        assert set(run.processes()) == {*SERVICES, "training", "mesh"}
        # What talks to the services may die too: training does not notice, and it comes back.
        training, killed, epochs = run.process("training").pid, run.kill("mesh"), len(run.metrics())
        run.until(lambda: run.processes().get("mesh", psutil.Process()).pid not in (killed, os.getpid()), "its return")
        run.until_epoch(epochs + 2)
        assert run.process("training").pid == training
        run.signal(signal.SIGKILL)
        assert run.wait().code == -signal.SIGKILL
        deadline = time.monotonic() + 30.0
        while left := run.left_over():
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.05)


def test_ctrl_c_twice_ends_it_now(tmp_path: Path) -> None:
    with running(tmp_path, *SHORT, "training.epochs=500") as run:
        run.until_epoch(2)
        training = run.process("training")
        training.send_signal(signal.SIGSTOP)  # it will never save a checkpoint: only the second Ctrl-C helps
        run.signal(signal.SIGINT)
        run.until(lambda: "saving a checkpoint" in run.told(), "the answer to the first Ctrl-C")
        run.signal(signal.SIGINT)
        ended = run.wait(20.0)
        assert ended.code == 130, ended.err
        assert "stopping now" in ended.err
        assert run.left_over() == []


def test_ctrl_c_before_training_began(tmp_path: Path) -> None:
    with running(tmp_path, *SHORT) as run:
        run.process("urza")
        run.signal(signal.SIGINT)
        ended = run.wait(40.0)
        assert ended.code == 130, ended.err
        assert ended.summary["status"] == "interrupted"
        assert "Traceback" not in ended.err
        assert run.left_over() == []
