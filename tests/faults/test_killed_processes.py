"""kill -9 during a run: of every service, and of the process that trains."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.infrastructure.runs import SERVICES, SHORT, running, validation_figures
from tests.infrastructure.short_run import ShortRun, lives

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def test_each_service_may_be_killed_and_the_run_ends_well(tmp_path: Path) -> None:
    """The library and the compiler die while a kernel is on its way, the others one after the other."""
    overrides = (
        *("training.epochs=150", "compare=[]", "growth.decisions=1", "growth.kernel_timeout_epochs=100"),
        # Kernels that come late meet a network that has learned most: what they are worth is not the question here.
        "growth.evaluation.threshold=-100",
    )
    with running(tmp_path, *overrides) as run:
        run.until(lambda: run.lines("decisions.jsonl"), "a decision")
        killed = {}
        for wave in (("tezzeret", "urza"), ("oona", "kasmina"), ("tolaria", "tamiyo")):
            for name in wave:
                killed[name] = run.kill(name)
            for name in wave:
                run.until_back(name, killed[name])
        ended = run.wait()
        assert ended.code == 0, ended.err
        assert ended.summary["status"] == "succeeded"
        assert ended.summary["epochs"] == 150
        assert {name: service["restarts"] for name, service in ended.summary["services"].items()} == dict.fromkeys(
            SERVICES, 1
        )
        assert ended.summary["adaptations"]["fossilized"] > 0, "no seed outlived the kills"
        assert ended.summary["events"]["dropped"] == 0
        report = (run.folder / "report.html").read_text()
        for name in SERVICES:
            assert f"{name} exited: killed by SIGKILL" in report
            assert f"{name} restarting: restart 1 of at most 10" in report
            assert f"{name} exited: killed by SIGKILL" in ended.err, "people are not told"
        assert run.left_over() == []


@pytest.mark.parametrize("every", [1, 100], ids=["from its checkpoint", "from its journal alone"])
def test_a_killed_training_process_is_resumed_and_equals_its_twin(
    short_run: ShortRun, tmp_path: Path, every: int
) -> None:
    """Killed while its seeds are under way, after its first checkpoint and before; the twin was not interrupted."""
    with running(tmp_path, *SHORT, f"training.checkpoint_every_epochs={every}") as run:
        run.until_epoch(3)
        before = run.kill("training")
        ended = run.wait()
        assert ended.code == 0, ended.err
        assert "from its last checkpoint" in ended.err, "people are not told"
        report = (run.folder / "report.html").read_text()
        assert "training exited: killed by SIGKILL" in report
        assert before not in {process.pid for process in run.left_over()}
        assert run.left_over() == []
        assert validation_figures(run.metrics()) == validation_figures(short_run.metrics())
    twin = short_run.ended.summary
    assert ended.summary["accuracy"]["grown"] == twin["accuracy"]["grown"]
    assert lives(ended.summary) == lives(twin)
    assert ended.summary["flops"] == twin["flops"]


def test_a_run_killed_after_its_rewind_equals_its_host(tmp_path: Path) -> None:
    """Every seed fails and is rewound, so that growth leaves nothing behind but its bill: the host is the twin."""
    overrides = ("training.epochs=6", "growth.evaluation.min_epochs=1", "growth.evaluation.threshold=100")
    with running(tmp_path, *SHORT, *overrides, "growth.evaluation.cull=rewind", "compare=[host]") as run:
        run.until(lambda: [line for line in run.lines("events.jsonl") if line["kind"] == "rewind"], "a rewind")
        run.kill("training")
        ended = run.wait()
        assert ended.code == 0, ended.err
        report = (run.folder / "report.html").read_text()
        # All but what was spent, which comes last.
        grown, host = ([f[:-1] for f in validation_figures(run.metrics(arm))] for arm in ("grown", "host"))
        assert grown == host
        assert run.left_over() == []
    told = ended.summary
    assert "these steps are made again without seed-1" in ended.err, "people are not told"
    assert told["training_restarts"] == told["rewinds"] == 1
    assert all("; rewound to step" in seed["reason"] for seed in told["seeds"])
    assert told["adaptations"]["culled"] == told["adaptations"]["started"] > 0
    assert told["accuracy"]["grown"] == told["accuracy"]["host"]
    assert told["flops"]["discarded"] > 0
    assert told["flops"]["training"] == told["arms"]["host"]["training_flops"] + told["flops"]["discarded"]
    assert "steps since then made again without it: 1x." in report
