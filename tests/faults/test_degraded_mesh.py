"""The mesh answers late, wrongly or not at all, the disk is full: training goes on and says what it did without."""

from __future__ import annotations

import resource
import shutil
import signal
from pathlib import Path

import grpc
import pytest

from esper.kasmina.v1 import adaptation_pb2, kasmina_service_pb2, topology_pb2
from esper.kasmina.v1.kasmina_service_pb2_grpc import KasminaServiceStub
from services.tolaria.checkpoint import CheckpointStore
from tests.infrastructure.runs import SHORT, Run, running
from tests.infrastructure.short_run import ShortRun

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

_UNKNOWN = "0" * 32


def test_tamiyo_is_late_and_a_caller_asks_for_an_unknown_blueprint(tmp_path: Path) -> None:
    """Tamiyo stands still for the first decision: no adaptation in that epoch. It is asked again, and answers."""
    with running(tmp_path, *SHORT, "growth.decisions=2") as run:
        run.address("tamiyo")
        tamiyo = run.process("tamiyo")
        tamiyo.send_signal(signal.SIGSTOP)
        first = run.until(lambda: run.lines("decisions.jsonl"), "the first decision")[0]
        tamiyo.send_signal(signal.SIGCONT)
        refused = _command_unknown_blueprint(run)
        ended = run.wait()
        assert ended.code == 0, ended.err
        late, answered = run.lines("decisions.jsonl")
        assert late == first
        assert late["decision"] is None
        assert "Tamiyo" in late["explanation"]
        assert "0.5 s" in late["explanation"] or "deadline" in late["explanation"].lower()
        assert late["explanation"] in ended.err, "people are not told"
        assert late["explanation"] in (run.folder / "report.html").read_text()
        assert answered["decision"] is not None, answered["explanation"]
        assert len(run.metrics()) == 16
        assert all(seed["state"] in ("FOSSILIZED", "CULLED") for seed in ended.summary["seeds"])

        assert refused.state == adaptation_pb2.ADAPTATION_STATE_REFUSED
        assert refused.error.reason == "UNKNOWN_BLUEPRINT"
        assert _UNKNOWN in refused.error.message
        assert not any(seed["blueprint"] == _UNKNOWN for seed in ended.summary["seeds"])
        assert run.left_over() == []


def _command_unknown_blueprint(run: Run) -> adaptation_pb2.Adaptation:
    """Command it through Kasmina's gateway and wait for the end of the adaptation."""
    name = f"runs/{run.folder.name}"
    with run.channel("kasmina") as channel:
        stub = KasminaServiceStub(channel)

        def attached() -> topology_pb2.Topology | None:
            try:
                return stub.GetTopology(kasmina_service_pb2.GetTopologyRequest(run=name), timeout=5.0).topology
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.NOT_FOUND:
                    return None
                raise

        topology = run.until(attached, "the run's network at Kasmina's gateway")
        command = adaptation_pb2.AdaptationCommand(
            command_id="test-unknown-blueprint",
            run=name,
            requester="a test",
            germinate=adaptation_pb2.Germinate(
                slot=topology.slots[0].name, blueprint=f"blueprints/{_UNKNOWN}", size=1, reason="it does not exist"
            ),
        )
        request = kasmina_service_pb2.ApplyAdaptationRequest(command=command)
        queued = stub.ApplyAdaptation(request, timeout=5.0).adaptation

        def settled() -> adaptation_pb2.Adaptation | None:
            request = kasmina_service_pb2.GetAdaptationRequest(name=queued.name)
            found = stub.GetAdaptation(request, timeout=5.0).adaptation
            return found if found.state != adaptation_pb2.ADAPTATION_STATE_QUEUED else None

        return run.until(settled, "the command's result")


def test_a_kernel_with_a_wrong_digest_never_reaches_the_network(short_run: ShortRun, tmp_path: Path) -> None:
    """Another run's library, with a changed byte in every artifact: all seeds end with that reason."""
    state = tmp_path / "state"
    shutil.copytree(short_run.folder / "state", state)
    artifacts = [path for path in (state / "urza" / "artifacts").rglob("*") if path.is_file()]
    assert artifacts, "there is nothing to tamper with"
    for artifact in artifacts:
        content = bytearray(artifact.read_bytes())
        content[-1] ^= 1
        artifact.chmod(0o600)
        artifact.write_bytes(content)
    with running(tmp_path / "out", *SHORT, f"run.state_dir={state}") as run:
        ended = run.wait()
        assert ended.code == 0, ended.err
        seeds = ended.summary["seeds"]
        assert seeds, "no seed was germinated"
        assert {seed["state"] for seed in seeds} <= {"CANCELLED", "CULLED"}
        for seed in seeds:
            assert "digest" in seed["reason"].lower(), seed["reason"]
            assert seed["reason"] in ended.err, "people are not told"
        assert ended.summary["parameters"]["final"] == ended.summary["parameters"]["host"]
        assert len(run.metrics()) == 16
        assert run.left_over() == []


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(tmp_path: Path) -> None:
    """Files of the training process may grow no more from some point on, then they may again.

    The limit stands for the full disk: it needs no rights, and the process meets it in the same place, as an OSError
    of its write.
    """
    with running(tmp_path, *SHORT, "training.epochs=24", "training.checkpoint_keep=2") as run:
        run.until_epoch(3)
        training = run.process("training")
        journal = (run.folder / "journal.jsonl").stat().st_size
        training.rlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        failed = run.until(lambda: _sentence(run, "training goes on"), "the news of a full disk")
        store = CheckpointStore(run.folder / "checkpoints", 2)
        intact = store.steps()
        assert intact, "no old checkpoint is left"
        for step in intact:
            assert store.load(step).values["step"] == step
        training.rlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        ended = run.wait()
        assert ended.code == 0, ended.err
        assert "was not written" in failed
        assert ended.summary["status"] == "succeeded"
        assert ended.summary["epochs"] == 24
        assert store.steps()[-1] == 24 * 29, "checkpoints are not written again once there is room"
        assert len(store.steps()) == 2
        assert not list((run.folder / "checkpoints").glob(".*")), "half a checkpoint is left"
        assert (run.folder / "journal.jsonl").stat().st_size >= journal
        assert run.left_over() == []


def _sentence(run: Run, words: str) -> str | None:
    return next((line for line in run.told().splitlines() if words in line), None)
