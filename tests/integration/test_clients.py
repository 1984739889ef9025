"""Each generated client's example follows a run that is really going on, and tells what grpcio's own client reads."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import grpc
import pytest

from esper.kasmina.v1 import kasmina_service_pb2, seed_pb2
from esper.kasmina.v1.kasmina_service_pb2_grpc import KasminaServiceStub
from esper.urza.v1 import blueprint_service_pb2
from esper.urza.v1.blueprint_service_pb2_grpc import BlueprintServiceStub
from tests.infrastructure.processes import ROOT, need
from tests.infrastructure.runs import SHORT, Run, running

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(300)]

_CLIENTS: Final = ROOT / "clients"
_SECONDS: Final = 240
#: Snapshot, bookmark and three changes: enough that the run is seen to go on.
_MESSAGES: Final = 5


def _finish(command: Sequence[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_SECONDS, check=False
    )


def _build(command: Sequence[str], folder: Path) -> None:
    done = _finish(command, folder)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def _python(scratch: Path) -> Sequence[str]:
    return [sys.executable, str(_CLIENTS / "python" / "example.py")]


def _typescript(scratch: Path) -> Sequence[str]:
    programs = _CLIENTS / "typescript" / "node_modules" / ".bin"
    need(programs.exists() and shutil.which("node") is not None, "Node 20 is missing, or its packages (make setup)")
    _build([str(programs / "tsc")], _CLIENTS / "typescript")
    return [str(programs / "tsx"), str(_CLIENTS / "typescript" / "src" / "example.ts")]


def _go(scratch: Path) -> Sequence[str]:
    need(shutil.which("go") is not None, "Go 1.23 is missing (Debian: golang-go)")
    _build(["go", "vet", "./..."], _CLIENTS / "go")
    program = str(scratch / "example")
    _build(["go", "build", "-mod=readonly", "-o", program, "./cmd/example"], _CLIENTS / "go")
    return [program]


def _java(scratch: Path) -> Sequence[str]:
    need(shutil.which("java") is not None and shutil.which("mvn") is not None, "Java 17 or Maven is missing")
    _build(["mvn", "-B", "-q", "package"], _CLIENTS / "java")
    return ["java", "-jar", str(_CLIENTS / "java" / "target" / "esper-client-0.1.0.jar")]


_MAKE: Final = {"python": _python, "typescript": _typescript, "go": _go, "java": _java}


@dataclass(frozen=True)
class Live:
    """A run that goes on, its addresses, and what a client must tell of it."""

    addresses: Path
    blueprints: frozenset[str]
    seeds: frozenset[str]


def _seeds(run: Run) -> frozenset[str]:
    """Name and slot of each seed; states change while we look."""
    with run.channel("kasmina") as channel:
        request = kasmina_service_pb2.ListSeedsRequest(run="runs/-")
        found = KasminaServiceStub(channel).ListSeeds(request, timeout=10.0).seeds
    return frozenset(f"seed {seed.name} {seed.slot}" for seed in found)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A run that has grown and goes on for longer than any client takes to build."""
    output = tmp_path_factory.mktemp("live")
    # The window is a share of the epochs: it begins with the first of them and ends with the thousandth.
    endless = ("training.epochs=100000", "growth.window=[0.00003,0.01]", "training.checkpoint_every_epochs=1000")
    with running(output, *SHORT, *endless) as run:
        run.until_epoch(1)
        seeds = run.until(lambda: _seeds(run), "a seed")
        with run.channel("urza") as channel:
            request = blueprint_service_pb2.ListBlueprintsRequest()
            library = BlueprintServiceStub(channel).ListBlueprints(request, timeout=10.0).blueprints
        blueprints = frozenset(f"blueprint {each.name} {each.spec.family}" for each in library)
        yield Live(run.folder / "addresses.json", blueprints, seeds)


@pytest.mark.parametrize("language", _MAKE)
def test_the_example_lists_and_follows(language: str, live: Live, tmp_path: Path) -> None:
    program = _MAKE[language](tmp_path)
    done = _finish([*program, str(live.addresses), str(_MESSAGES)], tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()

    assert live.blueprints, "the library is empty"
    assert {line for line in lines if line.startswith("blueprint ")} == live.blueprints

    seeds = [line for line in lines if line.startswith("seed ")]
    assert live.seeds <= {line.rpartition(" ")[0] for line in seeds}
    states = {name.removeprefix("SEED_STATE_") for name in seed_pb2.SeedState.keys()}  # noqa: SIM118 - no dictionary
    assert {line.rpartition(" ")[2] for line in seeds} <= states - {"UNSPECIFIED"}

    watched = [line.split() for line in lines if line.startswith("watch ")]
    run = f"runs/{live.addresses.parent.name}"
    assert len(watched) == _MESSAGES
    assert watched[0][1:4] == ["SNAPSHOT", run, "TRAINING"]
    assert watched[1][1:] == ["BOOKMARK"]
    epochs = [int(words[5].partition("/")[0]) for words in watched if words[1] == "MODIFIED"]
    assert epochs, "the run was not seen to go on"
    assert epochs == sorted(epochs)


@pytest.mark.parametrize("language", _MAKE)
def test_a_mesh_that_is_gone_is_one_line_and_a_failure(language: str, tmp_path: Path) -> None:
    program = _MAKE[language](tmp_path)
    done = _finish([*program, str(tmp_path / "addresses.json")], tmp_path)
    assert done.returncode == 1
    assert "addresses.json" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr


async def test_python_tells_the_reason_of_an_error(live: Live) -> None:
    from grpclib.exceptions import GRPCError

    from esper_client import Mesh, kasmina, reason_of

    async with Mesh.from_file(live.addresses) as mesh:
        with pytest.raises(GRPCError) as refused:
            await mesh.seeds.get_topology(kasmina.GetTopologyRequest(run="runs/none"), timeout=10.0)
    assert reason_of(refused.value) == "RUN_NOT_FOUND"
    assert refused.value.status.value == grpc.StatusCode.NOT_FOUND.value[0]
