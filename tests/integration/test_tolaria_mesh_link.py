"""The training process's end of its mesh: a real process at the other end, real services behind it, kills included."""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from esper.events.v1 import events_pb2
from esper.kasmina.v1 import kasmina_service_pb2, seed_pb2
from esper.kasmina.v1.kasmina_service_pb2_grpc import KasminaServiceStub
from esper.tamiyo.v1 import outcome_pb2
from esper.tolaria.v1 import run_pb2, training_service_pb2
from esper.tolaria.v1.training_service_pb2_grpc import TrainingServiceStub
from services.blueprints import signature
from services.chassis.config.loader import dump
from services.chassis.process import BACKGROUND_CORES
from services.kasmina.kernel_cache import KernelCache
from services.tolaria import frames, observation
from services.tolaria.kernel_shelf import KernelShelf
from services.tolaria.mesh_link import MeshLink
from services.tolaria.ports import (
    CommandKind,
    CommandResult,
    Decision,
    EventCounts,
    KernelTarget,
    KernelUnavailableError,
    NoDecision,
)
from services.tolaria.trainer import TolariaTrainer
from tests.integration.live_services import SECONDS, Services, until
from tests.integration.trainer_harness import WIDEN, Harness, config_of

pytestmark = pytest.mark.parallel
RUN = "run-1"
NAME = f"runs/{RUN}"


@pytest.fixture(scope="module")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    folder = tmp_path_factory.mktemp("link")
    config = config_of(growth={"decision_deadline_seconds": 5.0})
    (folder / "config.yaml").write_text(dump(config))
    signature.generate_keypair(folder / "state" / "keys")
    running = Services(config, folder)
    running.start()
    yield running
    running.stop()


def link_of(services: Services) -> MeshLink:
    keys = signature.load_public_key(services.run_dir / "state" / "keys")
    shelf = KernelShelf(services.run_dir / "kernels", KernelCache(1 << 20), keys)
    return MeshLink(config=services.config, run=RUN, run_dir=services.run_dir, shelf=shelf, incarnation=time.time_ns())


@pytest.fixture
def link(services: Services) -> Iterator[MeshLink]:
    made = link_of(services)
    made.start()
    made.show(run_pb2.Run(name=NAME, epochs=6, state=run_pb2.RUN_STATE_TRAINING))
    yield made
    made.stop()


@pytest.fixture
def trainer(services: Services, tmp_path: Path) -> TolariaTrainer:
    return Harness(tmp_path, services.config).trainer()


def other(link: MeshLink) -> int:
    """The process at the other end."""
    return int(until(lambda: link._process is not None and link._process.pid, "the other process"))


def observe(trainer: TolariaTrainer) -> Any:
    trainer.step = 9
    trainer._measure_health(1)
    return observation.observe(trainer._situation(1), trainer.engine, trainer.health, [WIDEN])


def target_of(trainer: TolariaTrainer, *, size: int = 1, seed: int = 1) -> KernelTarget:
    return KernelTarget(WIDEN, trainer.engine.interface("groups.0.conv1"), size, seed)


def attached(services: Services) -> bool:
    with grpc.insecure_channel(services.address("tolaria")) as channel:
        stub = TrainingServiceStub(channel)
        try:
            return bool(stub.GetRun(training_service_pb2.GetRunRequest(name=NAME)).run.attached)
        except grpc.RpcError:
            return False


def test_all_that_a_run_asks_and_tells_goes_through(
    services: Services, link: MeshLink, trainer: TolariaTrainer
) -> None:
    assert WIDEN.id in {blueprint.id for blueprint in link.candidates()}
    answer = link.decide(observe(trainer), policy="utilization", request_id="a", deadline=5.0)
    assert isinstance(answer, Decision)
    assert {change.blueprint for change in answer.plan} == {WIDEN.id}
    assert {item["slot"] for item in answer.evidence if item["chosen"]} == {change.slot for change in answer.plan}
    refused = link.decide(observe(trainer), policy="oracle", request_id="b", deadline=5.0)
    assert isinstance(refused, NoDecision)
    assert "oracle" in refused.reason
    request = link.obtain_kernel(target_of(trainer))
    digest = request.result(SECONDS)
    assert request.done
    assert link.shelf.take(digest).manifest.size == 1
    assert link.shelf.stats().hits == 1, "it was at hand before it was asked for"
    with pytest.raises(KernelUnavailableError):
        link.obtain_kernel(KernelTarget(WIDEN, trainer.engine.interface("span:groups.0"), 1, 1)).result(SECONDS)
    event = events_pb2.RunStateChanged(run=NAME, state=run_pb2.RUN_STATE_TRAINING, reason="test")
    link.publish("system.events.epoch", RUN, event)
    link.publish("telemetry.seed.health", RUN, event)  # not of that topic: refused, and counted
    until(lambda: link.event_counts() == EventCounts(1, 1), "one of each")
    link.report_outcome(outcome_pb2.Outcome(), "")  # refused by Tamiyo, and no reason to stop


def test_a_kernel_that_nobody_needs_or_that_was_changed_is_not_given(link: MeshLink, trainer: TolariaTrainer) -> None:
    request = link.obtain_kernel(target_of(trainer, seed=99))
    with pytest.raises(KernelUnavailableError, match="not there in time"):
        request.result(0.0)
    request.cancel()
    with pytest.raises(KernelUnavailableError, match="not there in time"):
        request.result(SECONDS)
    digest = link.obtain_kernel(target_of(trainer, seed=100)).result(SECONDS)
    link.shelf._cache.unload(bytes.fromhex(digest))
    (link.shelf._files._folder / f"{digest}.safetensors").write_bytes(b"somebody else's")
    asked = link.obtain_kernel(target_of(trainer, seed=101))
    link._answered(asked.request["id"], {"digest": digest})  # type: ignore[attr-defined]  # the link's own kind
    with pytest.raises(KernelUnavailableError, match="not in the run folder any more"):
        asked.result(SECONDS)
    link._answered(10**6, {"digest": digest})  # nobody waits for it any more
    link._hear({"kernel": digest})


def test_what_comes_while_training_computes_is_heard_when_it_looks(link: MeshLink, trainer: TolariaTrainer) -> None:
    assert link.until_ready(SECONDS)
    request = link.obtain_kernel(target_of(trainer, seed=200))
    until(lambda: any(b'"digest"' in read for read in list(link._unheard)), "its answer is read")
    assert not request.future.done(), "heard by the thread beside a step"  # type: ignore[attr-defined]  # as above
    assert request.done
    assert link.shelf.take(request.result(0.0)).manifest.size == 1


def test_what_nobody_hears_for_long_is_no_heap(services: Services) -> None:
    link = link_of(services)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # as many reads as are sent
    reading = threading.Thread(target=link._read, args=(ours,))
    reading.start()
    with ours, theirs:
        for published in range(100):
            theirs.send(frames.pack({"counts": {"published": published, "dropped": 0}}))
        until(lambda: link._counts.published >= 64, "the reading thread heard them itself")
        assert len(link._unheard) <= 64
        theirs.shutdown(socket.SHUT_RDWR)
        reading.join()
    assert link._counts.published == 99


def test_tamiyo_that_is_late_costs_the_decision_and_nothing_else(
    services: Services, link: MeshLink, trainer: TolariaTrainer
) -> None:
    known = link.candidates()
    process = psutil.Process(other(link))
    process.suspend()
    try:
        answer = link.decide(observe(trainer), policy="utilization", request_id="late", deadline=0.1)
        assert isinstance(answer, NoDecision)
        assert answer.reason == "Tamiyo did not answer within 0.1 s"
        # What it does not take waits here, within bounds: events are dropped and counted beyond them.
        seed = seed_pb2.Seed(name=f"{NAME}/seeds/seed-1", reason="x" * 100_000)
        for _ in range(100):
            link.show(seed)
        assert link._backlog
        queue = services.config.telemetry.event_queue_size
        event = events_pb2.RunStateChanged(run=NAME, state=run_pb2.RUN_STATE_TRAINING, reason="test")
        for _ in range(queue):
            link.publish("system.events.epoch", RUN, event)
        assert len(link._backlog) == queue
        dropped = link._earlier.dropped
        assert dropped > 0
        assert link.commands() == ()
    finally:
        process.resume()
    assert link.candidates() == known
    until(lambda: link.commands() or not link._backlog, "what waited is sent")
    until(lambda: link.event_counts().published == queue - dropped, "what was not dropped is published")


def test_commands_wait_until_they_are_taken_and_are_answered(services: Services, link: MeshLink) -> None:
    until(lambda: attached(services), "the run is attached")
    with grpc.insecure_channel(services.address("tolaria")) as channel, ThreadPoolExecutor() as pool:
        stub = TrainingServiceStub(channel)
        request = training_service_pb2.PauseRunRequest(name=NAME, request_id="p")
        pausing = pool.submit(stub.PauseRun, request, timeout=20)
        link.wait(SECONDS)
        (command,) = until(link.commands, "the command")
        assert command.kind is CommandKind.PAUSE
        assert link.commands() == ()
        link.show(run_pb2.Run(name=NAME, state=run_pb2.RUN_STATE_PAUSED))
        link.answer(CommandResult(command=command, step=3))
        assert pausing.result().run.state == run_pb2.RUN_STATE_PAUSED
        # Passed on again, as by a process that has no memory: answered again, and not carried out again.
        link._take(command)
        assert link.commands() == ()
    for number in range(5000):
        link._remember(f"old-{number}", None)
    assert len(link._results) == 4096


def test_a_process_that_is_killed_is_started_again_and_told_everything(
    services: Services, link: MeshLink, trainer: TolariaTrainer
) -> None:
    engine = trainer.engine
    until(lambda: attached(services), "the run is attached")
    link.show(observation.topology(RUN, engine, epoch=0, step=7))
    link.show(seed_pb2.Seed(name=f"{NAME}/seeds/seed-1", state=seed_pb2.SEED_STATE_GERMINATED))
    event = events_pb2.RunStateChanged(run=NAME, state=run_pb2.RUN_STATE_TRAINING, reason="test")
    link.publish("system.events.epoch", RUN, event)
    until(lambda: link.event_counts().published == 1, "the event is published")
    first = other(link)
    os.kill(first, signal.SIGSTOP)
    asked: list[Decision | NoDecision] = []
    waiting = threading.Thread(
        target=lambda: asked.append(
            link.decide(observe(trainer), policy="utilization", request_id="k", deadline=SECONDS)
        )
    )
    waiting.start()
    until(lambda: link._calls, "the question is asked")
    request = link.obtain_kernel(target_of(trainer, seed=7))
    link.publish("system.events.epoch", RUN, event)
    os.kill(first, signal.SIGKILL)
    waiting.join(SECONDS)
    assert isinstance(asked[0], NoDecision)
    assert asked[0].reason == "the process that talks to the services died"
    assert request.result(SECONDS), "it was asked for again"
    assert other(link) != first
    counts = until(lambda: (found := link.event_counts()).dropped and found, "the lost event counts as dropped")
    assert counts == EventCounts(1, 1)

    def shown() -> bool:
        with grpc.insecure_channel(services.address("kasmina")) as channel:
            stub = KasminaServiceStub(channel)
            try:
                topology = stub.GetTopology(kasmina_service_pb2.GetTopologyRequest(run=NAME)).topology
                seeds = stub.ListSeeds(kasmina_service_pb2.ListSeedsRequest(run=NAME)).seeds
            except grpc.RpcError:
                return False
        return (topology.step, len(seeds)) == (7, 1)

    until(shown, "the gateway shows the run")
    assert isinstance(link.decide(observe(trainer), policy="utilization", request_id="k", deadline=5.0), Decision)


def test_it_leaves_with_the_training_process_and_leaves_the_cores_that_train(
    services: Services, monkeypatch: pytest.MonkeyPatch, trainer: TolariaTrainer
) -> None:
    cores = os.sched_getaffinity(0)
    monkeypatch.setenv(BACKGROUND_CORES, str(min(cores)))
    link = link_of(services)
    link.start()
    process = psutil.Process(other(link))
    assert link.until_ready(SECONDS)
    assert process.cpu_affinity() == [min(cores)]
    assert all(os.sched_getaffinity(thread.id) == {min(cores)} for thread in process.threads())
    native = link._thread.native_id
    assert native is not None
    # It holds the lock of our interpreter now and then: nobody may put it to sleep meanwhile.
    assert os.sched_getaffinity(native) == os.sched_getaffinity(0) == cores
    assert services.supervisor is not None
    pid = services.supervisor.services["tezzeret"].pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        request = link.obtain_kernel(target_of(trainer, seed=4711))
        started = time.monotonic()
        link.stop()
        assert time.monotonic() - started < SECONDS
    finally:
        os.kill(pid, signal.SIGCONT)
    assert not process.is_running()
    with pytest.raises(KernelUnavailableError):
        request.result(0.0)
    # The kernel closes the socket of a training process that is killed.
    link = link_of(services)
    link.start()
    process = psutil.Process(other(link))
    assert link.until_ready(SECONDS)
    assert link._socket is not None
    link._stopping.set()
    link._socket.shutdown(2)
    until(lambda: not process.is_running(), "it has left")
    link.stop()


def run_folder_of(services: Services, folder: Path) -> MeshLink:
    (folder / "config.yaml").write_text(dump(services.config))
    keys = signature.generate_keypair(folder / "state" / "keys")
    shelf = KernelShelf(folder / "kernels", KernelCache(1 << 20), keys.public_key)
    return MeshLink(config=services.config, run=RUN, run_dir=folder, shelf=shelf, incarnation=1)


def test_pictures_that_nobody_takes_are_replaced_by_newer_ones(services: Services) -> None:
    link = link_of(services)
    for epoch in range(100):
        link.show(run_pb2.Run(name=NAME, epochs=100, epoch=epoch, state=run_pb2.RUN_STATE_TRAINING))
        link.show(seed_pb2.Seed(name=f"{NAME}/seeds/s", size=epoch))
    assert len(link._backlog) == 2, "one of the run, one of its seed"
    link.start()
    try:
        link.until_ready(SECONDS)
        with grpc.insecure_channel(services.address("tolaria")) as channel:
            ask = TrainingServiceStub(channel).GetRun
            until(lambda: ask(training_service_pb2.GetRunRequest(name=NAME)).run.epoch == 99, "the newest picture")
    finally:
        link.stop()


def test_services_that_are_nowhere_are_looked_for_again(
    services: Services, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    link = run_folder_of(services, tmp_path)
    (tmp_path / "addresses.json").write_text("{}")
    link.start()
    first = other(link)
    until(lambda: other(link) != first, "it is started again")
    link.stop()
    assert "the services cannot be talked to" in capfd.readouterr().err


def test_nobody_waits_for_services_of_a_run_that_is_over(
    services: Services, trainer: TolariaTrainer, tmp_path: Path
) -> None:
    link = run_folder_of(services, tmp_path)
    link.start()
    process = psutil.Process(other(link))
    assert not link.until_ready(0.1)
    kernel = link.obtain_kernel(target_of(trainer))
    started = time.monotonic()
    link.stop()
    assert time.monotonic() - started < SECONDS / 3
    with pytest.raises(KernelUnavailableError, match="not there in time"):
        kernel.result(SECONDS)
    assert not process.is_running()
    link = run_folder_of(services, tmp_path)
    link.start()
    process = psutil.Process(other(link))
    assert link._socket is not None
    link._stopping.set()
    link._socket.shutdown(2)
    until(lambda: not process.is_running(), "it has left")
    link.stop()


def test_the_end_may_come_before_the_process_has_begun(services: Services) -> None:
    link = link_of(services)
    link._thread = threading.Thread(target=lambda: None)  # its first turn has not come
    link._thread.start()
    link.stop()
    assert link._process is None
