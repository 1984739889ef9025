"""The whole system on its quick start, shortened: what the first command of the README shows must be true."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest

from esper.events.v1 import events_pb2
from services.kasmina.lifecycle import FAMILY_PATHS, SeedState, check_transition
from tests.infrastructure.runs import SERVICES, running
from tests.infrastructure.short_run import ShortRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]


def _transitions(run: ShortRun) -> dict[str, list[dict[str, Any]]]:
    stories: dict[str, list[dict[str, Any]]] = {}
    for event in run.lines("events.jsonl"):
        if event["kind"] == "transition":
            stories.setdefault(event["seed"], []).append(event)
    return stories


def _settled(story: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The judgment of a seed; the slot of one that was culled may be free again before the run is over."""
    return next(event for event in story if event["to_state"] in (SeedState.FOSSILIZED, SeedState.CULLED))


def test_a_network_grows_by_itself(short_run: ShortRun) -> None:
    """Health observed, decision made and explained, kernel compiled and stored, grafted, measured, settled."""
    assert short_run.ended.code == 0, short_run.ended.err
    events = short_run.lines("events.jsonl")
    health = next(event for event in events if event["kind"] == "health")
    assert any(slot["effective_rank"] is not None for slot in health["slots"]), "no slot's health was measured"

    decision = short_run.lines("decisions.jsonl")[0]
    assert decision["decision"], f"Tamiyo gave no decision: {decision['explanation']}"
    assert decision["plan"], f"the plan is empty: {decision['explanation']}"
    assert all(change["reason"] for change in decision["plan"]), "a change of the plan is not explained"
    assert {change["slot"] for change in decision["plan"]} <= {item["slot"] for item in decision["evidence"]}
    assert {slot["slot"] for slot in health["slots"]} <= {item["slot"] for item in decision["evidence"]}

    stories = _transitions(short_run)
    assert len(stories) == len(decision["plan"]), "not every change of the plan became a seed"
    for story in stories.values():
        states = [SeedState(event["to_state"]) for event in story]
        assert story[0]["from_state"] == SeedState.DORMANT
        for before, after in zip([SeedState.DORMANT, *states], states, strict=False):
            check_transition(before, after)
        settled = _settled(story)
        if settled["to_state"] == SeedState.FOSSILIZED:
            assert tuple(states) == FAMILY_PATHS["widening"]
        worth = settled["contribution"]
        assert worth is not None, "a seed was settled without a counterfactual"
        assert worth["low"] <= worth["points"] <= worth["high"]
        assert worth["samples"] == 239, "the counterfactual is on the validation split"
    assert any(_settled(story)["to_state"] == SeedState.FOSSILIZED for story in stories.values()), "nothing was kept"
    metrics = short_run.metrics()
    assert metrics[-1]["parameters"] > metrics[0]["parameters"], "the network did not grow"


def test_the_json_line_holds_what_scripts_rely_on(short_run: ShortRun) -> None:
    summary = short_run.ended.summary
    assert len(short_run.ended.out.splitlines()) == 1, "standard output is more than the JSON line"
    assert summary["run_id"] == short_run.folder.name
    assert summary["run_dir"] == str(short_run.folder)
    assert (summary["status"], summary["epochs"]) == ("succeeded", 16)
    assert summary["startup_seconds"] > 0
    started = summary["adaptations"]["started"]
    assert started == len(summary["seeds"]) == summary["adaptations"]["fossilized"] + summary["adaptations"]["culled"]
    for seed in summary["seeds"]:
        assert seed["state"] in ("FOSSILIZED", "CULLED")
        assert seed["slot"]
        assert seed["blueprint"]
        assert set(seed["contribution"]) >= {"points", "low", "high", "confidence"}
    assert summary["parameters"]["final"] > summary["parameters"]["host"] > 0
    assert summary["flops"]["training"] > summary["flops"]["growth"] > 0
    assert all(0 < summary["accuracy"][arm] <= 100 for arm in ("grown", "host", "bigger"))
    assert set(summary["services"]) == set(SERVICES)
    for name, service in summary["services"].items():
        assert service == {"address": short_run.addresses[name], "restarts": 0}
    assert summary["events"]["published"] > 0
    assert summary["events"]["dropped"] == 0
    assert summary["report"] == str(short_run.folder / "report.html")
    assert json.loads((short_run.folder / "summary.json").read_text()) == summary


def test_the_run_folder_is_complete(short_run: ShortRun) -> None:
    folder = short_run.folder
    for name in (
        *("config.yaml", "format.json", "addresses.json", "journal.jsonl", "metrics.jsonl", "events.jsonl"),
        *("decisions.jsonl", "lineage.json", "mesh.json", "summary.json", "report.html"),
        *("export/weights.safetensors", "export/growth.json", "export/rebuild.py"),
        *("state/keys/tezzeret.key", "state/keys/tezzeret.pub", "state/urza/library.sqlite"),
        *(f"logs/{name}.log" for name in (*SERVICES, "training")),
    ):
        assert (folder / name).is_file(), f"{name} is missing"
        # The training process tells its story by other ways: its log is for what goes wrong.
        assert name == "logs/training.log" or (folder / name).stat().st_size, f"{name} is empty"
    assert json.loads((folder / "format.json").read_text())["format_version"] == 1
    assert (folder / "state/keys/tezzeret.key").stat().st_mode & 0o077 == 0, "the key is open to others"
    steps = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert len(steps) == 5, "the five newest checkpoints are kept"
    assert int(steps[-1]) == short_run.metrics()[-1]["step"]
    assert not list(folder.rglob("*.part"))
    assert {path.name.rsplit("-", 1)[0] for path in (folder / "traces").iterdir()} == {*SERVICES, "training"}
    kernels = list((folder / "state" / "urza" / "artifacts").rglob("*"))
    assert any(path.is_file() for path in kernels), "no kernel lies in Urza"
    report = (folder / "report.html").read_text()
    for seed in short_run.ended.summary["seeds"]:
        assert seed["slot"] in report
    assert "killed by" not in report, "a quiet run tells of restarts"


def test_nothing_is_logged_as_an_error(short_run: ShortRun) -> None:
    for log in (short_run.folder / "logs").iterdir():
        text = log.read_text()
        assert "Traceback" not in text, f"{log.name}: {text[-3000:]}"
        assert '"level": "error"' not in text, f"{log.name}: {text[-3000:]}"


def test_the_story_is_on_the_bus(short_run: ShortRun) -> None:
    heard = short_run.events
    epochs = [event for event in heard["system.events.epoch"] if event.payload.Is(events_pb2.EpochCompleted.DESCRIPTOR)]
    assert len(epochs) == len(short_run.metrics()), "one event per epoch; those of the controls are no part of the run"
    told = sum(len(story) for story in _transitions(short_run).values())
    assert len(heard["telemetry.seed.transitions"]) == told
    assert len(heard["telemetry.seed.health"]) == sum(e["kind"] == "health" for e in short_run.lines("events.jsonl"))
    seeds = len(short_run.ended.summary["seeds"])
    assert len(heard["compilation.blueprint.submitted"]) == seeds
    ready = heard["compilation.kernel.ready"]
    assert len(ready) == len(heard["validation.kernel.characterized"]) == seeds
    assert all(event.payload.Is(events_pb2.KernelReady.DESCRIPTOR) for event in ready)
    assert len(heard["innovation.field_reports"]) == seeds


def test_only_the_training_process_has_torch_and_it_is_no_server(short_run: ShortRun) -> None:
    assert short_run.with_torch == {"training"}
    assert short_run.listening["training"] == short_run.listening["mesh"] == []
    for name in SERVICES:
        port = int(short_run.addresses[name].rpartition(":")[2])
        assert short_run.listening[name] == [port], f"{name} listens elsewhere too"


def test_no_process_is_left(short_run: ShortRun) -> None:
    assert short_run.left_over == []


def test_without_growth_nothing_is_asked_and_the_run_still_ends_well(tmp_path: Any) -> None:
    with running(tmp_path, "training.epochs=2", "compare=[]", arguments=["--no-growth"]) as run:
        ended = run.wait()
        assert ended.code == 0, ended.err
        assert ended.summary["adaptations"] == {"started": 0, "fossilized": 0, "culled": 0}
        assert ended.summary["accuracy"]["host"] is None
        assert "growth took" not in ended.err
        # Nothing grew, so there is no time that it took: null, not a measured zero.
        assert ended.summary["growth_seconds"] is None
        assert ended.summary["arms"]["grown"]["growth_cpu_seconds"] is None
        assert ended.summary["arms"]["grown"]["cpu_seconds"] > 0
        assert run.lines("decisions.jsonl") == []
        assert run.left_over() == []
