"""What a user gets wrong, or a disk: one clear message and the documented exit code, never a stack trace."""

from __future__ import annotations

import pickle
import socket
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.infrastructure.runs import Ended, running

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(240)]


def _one_message(ended: Ended, code: int, *words: str) -> None:
    """The exit code and the words, in one line that begins with the program's name; no stack trace anywhere."""
    assert ended.code == code, ended.err
    assert "Traceback" not in ended.err + ended.out
    lines = [line for line in ended.err.splitlines() if line.startswith("train.py: ")]
    assert len(lines) == 1, ended.err
    for word in words:
        assert word in lines[0], ended.err


def _cifar(folder: Path, *, truncated: str) -> None:
    """The files of CIFAR-10 with one image each; ``truncated`` is cut short."""
    folder.mkdir()
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    for name in names:
        content = pickle.dumps({b"data": np.zeros((1, 3072), np.uint8), b"labels": [0]}, protocol=2)
        (folder / name).write_bytes(content[: len(content) // 2] if name == truncated else content)


def test_a_truncated_data_file(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    _cifar(folder, truncated="data_batch_1")
    with running(tmp_path / "out", "data.name=cifar10", f"data.data_dir={tmp_path}", "compare=[]") as run:
        _one_message(run.wait(), 1, f"{folder / 'data_batch_1'} is damaged or truncated")
        assert run.left_over() == []


def test_missing_data_files(tmp_path: Path) -> None:
    with running(tmp_path / "out", "data.name=cifar10", f"data.data_dir={tmp_path / 'nowhere'}", "compare=[]") as run:
        _one_message(run.wait(), 1, str(tmp_path / "nowhere"))
        assert run.left_over() == []


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port of ours on which nobody listens."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


def test_a_service_elsewhere_that_cannot_be_reached(tmp_path: Path, closed_port: int) -> None:
    overrides = (f"services.urza.address=127.0.0.1:{closed_port}", "services.startup_timeout_seconds=2", "compare=[]")
    with running(tmp_path, *overrides) as run:
        ended = run.wait()
        _one_message(ended, 3, "urza", f"127.0.0.1:{closed_port}")
        assert ended.summary["status"] == "failed"
        assert run.left_over() == []


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with running(tmp_path, f"services.oona.port={port}", "compare=[]") as run:
            _one_message(run.wait(), 3, "oona", str(port))
            assert run.left_over() == []


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.epoch=3", ("training.epoch", "training.epochs")),
        ("training.epochs=many", ("training.epochs",)),
        ("data.name=mnist", ("data.name",)),
    ],
)
def test_a_wrong_configuration(tmp_path: Path, override: str, words: tuple[str, ...]) -> None:
    with running(tmp_path, override) as run:
        ended = run.wait()
        assert ended.code == 2, ended.err
        assert "Traceback" not in ended.err
        assert all(word in ended.err for word in words), ended.err
        assert not list(tmp_path.glob("*/format.json")), "a run folder was made for a run that cannot be"


def test_a_missing_configuration_file(tmp_path: Path) -> None:
    with running(tmp_path, config=str(tmp_path / "mine.yaml")) as run:
        ended = run.wait()
        assert ended.code == 2, ended.err
        assert "mine.yaml" in ended.err
        assert "Traceback" not in ended.err


def test_nothing_to_resume(tmp_path: Path) -> None:
    with running(tmp_path, arguments=["--resume", str(tmp_path / "gone")]) as run:
        _one_message(run.wait(), 2, str(tmp_path / "gone"))


_NEVER_FINITE = """
from torch import nn

class NeverFinite(nn.Module):
    def __init__(self, pixels, classes):
        super().__init__()
        self.layer = nn.Linear(pixels, classes)

    def forward(self, images):
        return self.layer(images.flatten(1)) * float("nan")

def make(shape, classes):
    return NeverFinite(shape[0] * shape[1] * shape[2], classes)
"""


def test_a_network_whose_loss_is_nan_from_the_first_step(tmp_path: Path) -> None:
    """Going back does not help it: after the rollbacks it is allowed, the run says so and fails."""
    (tmp_path / "never_finite.py").write_text(_NEVER_FINITE, encoding="utf-8")
    model = ("model.name=factory", "model.factory=never_finite:make", "compare=[]")
    with running(tmp_path / "out", *model, environment={"PYTHONPATH": str(tmp_path)}) as run:
        ended = run.wait()
        _one_message(ended, 1, "the loss is nan", "rollbacks")
        assert run.left_over() == []
        assert ended.summary["status"] == "failed"
        assert ended.summary["accuracy"]["grown"] is None
        assert Path(ended.summary["report"]).exists()
