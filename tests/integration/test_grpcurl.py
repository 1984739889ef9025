"""grpcurl, which knows only what the servers tell of themselves, lists and calls every service of a live run."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.infrastructure.processes import ROOT, need
from tests.infrastructure.runs import SERVICES, SHORT, Run, running

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(300)]

_BUILT: Final = ROOT / ".tools" / "bin" / "grpcurl"

#: Full name of the service for users, by process.
_PUBLIC: Final = {
    "urza": "esper.urza.v1.BlueprintService",
    "oona": "esper.oona.v1.EventService",
    "tamiyo": "esper.tamiyo.v1.PolicyService",
    "kasmina": "esper.kasmina.v1.KasminaService",
    "tolaria": "esper.tolaria.v1.TrainingService",
    "tezzeret": "esper.tezzeret.v1.CompileService",
}
#: Process, rpc, request ({run} is the run's name), and a field its answer has.
_CALLS: Final[tuple[tuple[str, str, dict[str, Any], str], ...]] = (
    ("urza", "ListBlueprints", {"family": "widen"}, "blueprints"),
    ("urza", "QueryKernels", {}, "kernels"),
    ("oona", "ListTopics", {"page_size": 3}, "topics"),
    ("oona", "Tail", {"last": 3, "no_follow": True}, "stored_event"),
    ("tamiyo", "ListPolicies", {}, "policies"),
    ("tamiyo", "ListDecisions", {"run": "{run}"}, "decisions"),
    ("kasmina", "GetTopology", {"run": "{run}"}, "topology"),
    ("kasmina", "ListSeeds", {"run": "runs/-"}, "seeds"),
    ("tolaria", "GetRun", {"name": "{run}"}, "run"),
    ("tolaria", "ListRuns", {}, "runs"),
    ("tezzeret", "ListTargets", {}, "targets"),
    ("tezzeret", "ListCompileJobs", {}, "jobs"),
)


def _program() -> str:
    found = str(_BUILT) if _BUILT.exists() else shutil.which("grpcurl")
    need(found is not None, "grpcurl is missing (make setup builds it where Go is)")
    return found or ""


def _grpcurl(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [_program(), "-plaintext", "-max-time", "20", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def _told(*arguments: str) -> str:
    done = _grpcurl(*arguments)
    assert done.returncode == 0, f"grpcurl {arguments}: {done.stderr}"
    return done.stdout


def _first(text: str) -> dict[str, Any]:
    """The first JSON object of what may be a stream of them."""
    found: dict[str, Any] = json.JSONDecoder().raw_decode(text)[0]
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """A run that has grown and goes on."""
    _program()
    endless = ("training.epochs=100000", "growth.window=[0.00003,0.01]", "training.checkpoint_every_epochs=1000")
    with running(tmp_path_factory.mktemp("live"), *SHORT, *endless) as going:
        going.until_epoch(1)
        # The first transition only germinates a seed: its kernel may still be in the making.
        going.until(lambda: "LOADING" in {event.get("to_state") for event in going.lines("events.jsonl")}, "a kernel")
        yield going


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_tells_what_it_offers(service: str, run: Run) -> None:
    listed = _told(run.address(service), "list").split()
    assert {_PUBLIC[service], "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"} <= set(listed)
    described = _told(run.address(service), "describe", _PUBLIC[service])
    for rpc in _told(run.address(service), "list", _PUBLIC[service]).split():
        assert f"rpc {rpc.rpartition('.')[2]} (" in described


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_is_healthy_as_a_whole_and_by_name(service: str, run: Run) -> None:
    for name in ("", _PUBLIC[service]):
        answer = _told("-d", json.dumps({"service": name}), run.address(service), "grpc.health.v1.Health/Check")
        assert json.loads(answer) == {"status": "SERVING"}


@pytest.mark.parametrize(("service", "rpc", "request_fields", "field"), _CALLS)
def test_a_service_answers(service: str, rpc: str, request_fields: dict[str, Any], field: str, run: Run) -> None:
    request = json.dumps(request_fields).replace("{run}", f"runs/{run.folder.name}")
    answer = _first(_told("-d", request, run.address(service), f"{_PUBLIC[service]}/{rpc}"))
    assert answer.get(field), f"{rpc} answered {answer}"


def test_every_service_is_called() -> None:
    assert {call[0] for call in _CALLS} == set(SERVICES) == set(_PUBLIC)


def test_an_error_comes_with_its_reason(run: Run) -> None:
    request = json.dumps({"run": "runs/none"})
    done = _grpcurl("-d", request, run.address("kasmina"), "esper.kasmina.v1.KasminaService/GetTopology")
    assert done.returncode != 0
    assert "NotFound" in done.stderr
    assert "RUN_NOT_FOUND" in done.stderr
