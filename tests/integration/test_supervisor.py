"""The supervisor with real processes: start, health, restarts, placement, stop, and no orphans."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import grpc.aio
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.chassis.channel import ADDRESSES_DIR
from services.chassis.child import Child
from services.chassis.config.schema import EsperConfig, ServicesConfig
from services.chassis.errors import EsperError, Reason
from services.chassis.supervisor import MAX_BACKOFF_SECONDS, NEEDS, Event, Job, State, Supervisor
from tests.support.echo import Running, running

pytestmark = pytest.mark.parallel
_ROOT = Path(__file__).resolve().parents[2]


def _program(name: str) -> Sequence[str]:
    return (sys.executable, "-m", "tests.support.mesh_service", name)


def _job(what: str, **options: Any) -> tuple[Job, asyncio.Queue[dict[str, Any]]]:
    heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    settings: dict[str, Any] = {"restart": lambda code, restarts: None, **options}
    command = (sys.executable, "-m", "tests.support.mesh_job", what)
    return Job(name="training", command=command, on_progress=heard.put_nowait, **settings), heard


def _only(name: str, outside: Running, **settings: Any) -> EsperConfig:
    """Start ``name`` alone: one server that is there already plays the others."""
    others: dict[str, Any] = {other: {"address": outside.address} for other in NEEDS if other != name}
    return EsperConfig.model_validate({"services": {"restart_backoff_seconds": 0.01, **others, **settings}})


class Mesh:
    """A run folder, and supervisors made for it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.seen: asyncio.Queue[Event] = asyncio.Queue()
        self.behave({})

    def behave(self, behavior: dict[str, str]) -> None:
        (self.folder / "behavior.json").write_text(json.dumps(behavior))

    def supervisor(self, config: EsperConfig | None = None, **options: Any) -> Supervisor:
        config = config or EsperConfig(services=ServicesConfig(restart_backoff_seconds=0.01))
        (self.folder / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
        settings: dict[str, Any] = {"program": _program, "on_event": self.seen.put_nowait, **options}
        return Supervisor(config, self.folder, **settings)

    async def until(self, name: str, kind: str) -> Event:
        async with asyncio.timeout(30):
            while True:
                event = await self.seen.get()
                if (event.name, event.kind) == (name, kind):
                    return event


@pytest.fixture
def mesh(tmp_path: Path) -> Mesh:
    return Mesh(tmp_path)


@pytest.fixture
async def outside() -> AsyncIterator[Running]:
    async with running() as server:
        yield server


async def _status(address: str) -> int:
    async with grpc.aio.insecure_channel(address) as channel:
        answer = await health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=10, wait_for_ready=True
        )
        return int(answer.status)


async def _gone(pid: int) -> None:
    """Wait until there is no such process, or only its shell that nobody reaps."""
    async with asyncio.timeout(20):
        while True:
            try:
                if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                    return
            except psutil.NoSuchProcess:
                return
            await asyncio.sleep(0.02)


async def test_six_services_are_started_at_once_and_all_serve(mesh: Mesh) -> None:
    async with mesh.supervisor() as supervisor:
        await supervisor.start()
        addresses = json.loads((mesh.folder / "addresses.json").read_text())
        assert set(addresses) == set(NEEDS)
        for name, status in supervisor.services.items():
            assert status.state is State.SERVING
            assert status.address == addresses[name]
            assert (mesh.folder / ADDRESSES_DIR / name).read_text().strip() == addresses[name]
            assert await _status(addresses[name]) == health_pb2.HealthCheckResponse.SERVING
            assert status.spawned_after is not None
            assert status.serving_after is not None
            assert status.spawned_after < status.serving_after
            assert status.pid is not None
            assert psutil.Process(status.pid).nice() == 10
        pids = [status.pid for status in supervisor.services.values()]
        supervisor.request_stop()
        assert await supervisor.wait() == 0
    for pid in pids:
        assert pid is not None
        assert not psutil.pid_exists(pid)
    assert {status.state for status in supervisor.services.values()} == {State.STOPPED}
    assert {status.last_exit for status in supervisor.services.values()} == {0}
    stopped = [event.name for event in supervisor.events if event.kind == "stopped"]
    assert stopped[0] == "tezzeret"
    await supervisor.stop()  # once more is nothing


async def test_without_a_word_it_starts_the_services_of_esper(mesh: Mesh, outside: Running) -> None:
    config = _only("tamiyo", outside)
    (mesh.folder / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    async with Supervisor(config, mesh.folder) as supervisor:
        await supervisor.start()
        pid = supervisor.services["tamiyo"].pid
        assert "services.tamiyo" in psutil.Process(pid).cmdline()


async def test_a_killed_service_comes_back_where_it_was(mesh: Mesh, outside: Running) -> None:
    async with mesh.supervisor(_only("urza", outside)) as supervisor:
        await supervisor.start()
        status = supervisor.services["urza"]
        for restart in (1, 2):
            address, pid = status.address, status.pid
            assert address is not None
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            assert (await mesh.until("urza", "exited")).detail == "killed by SIGKILL"
            await mesh.until("urza", "serving")
            assert status.address == address
            assert status.pid != pid
            assert status.restarts == restart
            assert await _status(address) == health_pb2.HealthCheckResponse.SERVING
        assert status.last_exit == -signal.SIGKILL


async def test_a_service_that_cannot_come_back_is_given_up_and_the_rest_goes_on(mesh: Mesh, outside: Running) -> None:
    config = _only("oona", outside, max_restarts=2)
    job, heard = _job("wait")
    async with mesh.supervisor(config) as supervisor:
        await supervisor.start(job)
        await heard.get()
        mesh.behave({"oona": "die"})
        pid = supervisor.services["oona"].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        gave_up = await mesh.until("oona", "gave_up")
        assert "2 restarts" in gave_up.detail
        assert supervisor.services["oona"].state is State.DOWN
        assert supervisor.services["oona"].last_exit == 9
        supervisor.request_stop()
        assert await supervisor.wait() == 143
    assert supervisor.services["oona"].state is State.DOWN


async def test_a_service_that_dies_at_its_start_is_named_with_its_last_words(mesh: Mesh, outside: Running) -> None:
    for behavior, words in (("die", "the reason in a line"), ("die mute", "it said nothing")):
        mesh.behave({"tamiyo": behavior})
        (mesh.folder / "logs" / "tamiyo.log").unlink(missing_ok=True)
        with pytest.raises(EsperError, match=rf"tamiyo could not start \(exit code 9\): {words}") as caught:
            async with mesh.supervisor(_only("tamiyo", outside)) as supervisor:
                await supervisor.start()
        assert caught.value.reason is Reason.SERVICE_START_FAILED
        assert caught.value.metadata["service"] == "tamiyo"
        assert supervisor.services["tamiyo"].state is State.STOPPED


async def test_a_service_that_never_serves_is_ended_in_time(mesh: Mesh, outside: Running) -> None:
    mesh.behave({"kasmina": "hang"})
    config = _only("kasmina", outside, startup_timeout_seconds=2.0, drain_seconds=0.2)
    with pytest.raises(EsperError, match=r"kasmina could not start \(not serving in time\)"):
        async with mesh.supervisor(config) as supervisor:
            await supervisor.start()


async def test_a_port_in_use_is_said_by_the_service_that_wanted_it(mesh: Mesh, outside: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config = _only("urza", outside, urza={"port": port})
        with pytest.raises(
            EsperError, match=rf"urza could not start \(exit code 3\).*127\.0\.0\.1:{port}.*PORT_IN_USE"
        ):
            async with mesh.supervisor(config) as supervisor:
                await supervisor.start()


async def test_a_service_configured_elsewhere_is_used_and_not_started(mesh: Mesh, outside: Running) -> None:
    async with mesh.supervisor(_only("oona", outside)) as supervisor:
        await supervisor.start()
        status = supervisor.services["urza"]
        assert status.state is State.EXTERNAL
        assert status.pid is None
        assert status.address == outside.address
        assert json.loads((mesh.folder / "addresses.json").read_text())["urza"] == outside.address
    assert status.state is State.EXTERNAL
    assert await _status(outside.address) == health_pb2.HealthCheckResponse.SERVING


async def test_a_service_configured_elsewhere_that_is_not_there_is_an_error(mesh: Mesh, outside: Running) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    config = _only("oona", outside, startup_timeout_seconds=2.0, urza={"address": address}, oona={"address": address})
    with pytest.raises(EsperError, match=f"(urza|oona) at {address}") as caught:
        async with mesh.supervisor(config) as supervisor:
            await supervisor.start()
    assert caught.value.reason is Reason.SERVICE_UNREACHABLE


async def test_nothing_is_left_of_a_start_that_anothers_failure_ended(mesh: Mesh, outside: Running) -> None:
    """Else what was left fails later, unasked, and asyncio prints its trace in the middle of ours."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"127.0.0.1:{free.getsockname()[1]}"
    mesh.behave({"kasmina": "hang"})
    config = _only("kasmina", outside, startup_timeout_seconds=1.0, drain_seconds=0.2, urza={"address": address})
    with pytest.raises(EsperError, match=f"urza at {address} is not serving"):
        async with mesh.supervisor(config) as supervisor:
            await supervisor.start()
    assert [task for task in asyncio.all_tasks() if "Supervisor" in repr(task.get_coro())] == []


async def test_a_job_runs_talks_and_ends(mesh: Mesh, outside: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESPER__TRAINING__EPOCHS", "3")
    job, heard = _job("done")
    async with mesh.supervisor(_only("urza", outside)) as supervisor:
        await supervisor.start(job)
        assert await supervisor.wait() == 0
        message = heard.get_nowait()
        assert message["bound"] is True
        assert "ESPER__TRAINING__EPOCHS" not in message["environment"]
        assert "ESPER_LIFELINE_FD" not in message["environment"]
        assert supervisor.job_restarts == 0


async def test_the_owner_of_a_job_says_how_it_goes_on_after_a_crash(mesh: Mesh, outside: Running) -> None:
    asked: list[tuple[int, int]] = []

    def restart(code: int, restarts: int) -> Sequence[str] | None:
        asked.append((code, restarts))
        what = ["wait", "fail"][restarts] if restarts < 2 else None
        return None if what is None else (sys.executable, "-m", "tests.support.mesh_job", what)

    job, heard = _job("fail", restart=restart)
    async with mesh.supervisor(_only("urza", outside)) as supervisor:
        await supervisor.start(job)
        assert (await heard.get())["what"] == "fail"
        waiting = await heard.get()
        assert waiting["what"] == "wait"
        os.kill(waiting["pid"], signal.SIGKILL)
        assert await supervisor.wait() == 7
    assert asked == [(7, 0), (-9, 1), (7, 2)]
    assert supervisor.job_restarts == 2


async def test_a_stop_lets_the_job_save_its_work(mesh: Mesh, outside: Running) -> None:
    job, heard = _job("wait", restart=lambda code, restarts: pytest.fail("a stopped job must not be restarted"))
    async with mesh.supervisor(_only("urza", outside)) as supervisor:
        await supervisor.start(job)
        await heard.get()
        supervisor.request_stop()
        assert await supervisor.wait() == 143
        assert (await heard.get())["what"] == "saved"


async def test_logs_of_the_children_are_bounded_while_they_write(
    mesh: Mesh, outside: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.chassis.supervisor._LOG_LOOK_SECONDS", 0.02)
    job, _ = _job("chatty")
    config = EsperConfig.model_validate(
        {
            "services": {name: {"address": outside.address} for name in NEEDS},
            "telemetry": {"log_max_bytes": 2**16, "log_files": 3},
        }
    )
    logs = mesh.folder / "logs"
    async with mesh.supervisor(config) as supervisor:
        await supervisor.start(job)
        async with asyncio.timeout(60):
            while not (logs / "training.log.2").exists():
                await asyncio.sleep(0.02)
    parts = [logs / name for name in ("training.log.2", "training.log.1", "training.log")]
    assert sorted(path.name for path in logs.iterdir()) == sorted(path.name for path in parts)
    numbers = [int(line.split()[0]) for part in parts for line in part.read_text().splitlines()]
    # What fell into the microseconds of a cut may be missing, nothing else; and no line is there twice or torn.
    assert numbers == sorted(set(numbers))
    assert len(numbers) >= numbers[-1] - 4
    assert all(2**16 < part.stat().st_size <= 2**17 for part in parts[:2])


async def test_a_second_stop_waits_for_nobody(mesh: Mesh, outside: Running) -> None:
    job, heard = _job("stubborn", stop_seconds=1000.0)
    async with mesh.supervisor(_only("urza", outside)) as supervisor:
        await supervisor.start(job)
        await heard.get()
        supervisor.request_stop()
        supervisor.request_stop(now=True)
        async with asyncio.timeout(20):
            assert await supervisor.wait() == -signal.SIGKILL
    assert supervisor.services["urza"].last_exit == -signal.SIGKILL


async def test_a_job_that_does_not_stop_is_killed_after_its_time(mesh: Mesh, outside: Running) -> None:
    job, heard = _job("stubborn", stop_seconds=0.2)
    async with mesh.supervisor(_only("urza", outside)) as supervisor:
        await supervisor.start(job)
        await heard.get()
    assert await supervisor.wait() == -signal.SIGKILL


async def test_a_stop_during_the_start_ends_it(mesh: Mesh) -> None:
    mesh.behave(dict.fromkeys(NEEDS, "hang"))
    config = EsperConfig(services=ServicesConfig(drain_seconds=0.1))
    async with mesh.supervisor(config) as supervisor:
        starting = asyncio.create_task(supervisor.start())
        await mesh.until("urza", "started")
        supervisor.request_stop(now=True)
        await asyncio.wait_for(starting, 20)
        assert not (mesh.folder / "addresses.json").exists()


async def test_a_stop_while_a_service_is_restarting_leaves_nothing(mesh: Mesh, outside: Running) -> None:
    async with mesh.supervisor(_only("urza", outside)) as supervisor:
        await supervisor.start()
        mesh.behave({"urza": "hang"})
        pid = supervisor.services["urza"].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await mesh.until("urza", "restarting")
        again = await mesh.until("urza", "started")
        await supervisor.stop(now=True)
    assert not psutil.pid_exists(int(again.detail.removeprefix("pid ")))


async def test_the_job_has_cores_of_its_own_and_the_services_the_rest(mesh: Mesh, outside: Running) -> None:
    cores = os.sched_getaffinity(0)
    job, heard = _job("wait")
    async with mesh.supervisor(_only("urza", outside), on_event=None) as supervisor:
        await supervisor.start(job)
        told = await heard.get()
        pid = told["pid"]
        # Known before anything is divided: its threads go aside when they begin.
        assert told["background"] == ",".join(str(core) for core in sorted(supervisor.placement.services))
        service = supervisor.services["urza"].pid
        assert service is not None
        if len(cores) > 1:
            assert supervisor.placement.job | supervisor.placement.services == cores
            assert os.sched_getaffinity(pid) == supervisor.placement.job
            for thread in psutil.Process(service).threads():
                assert os.sched_getaffinity(thread.id) == supervisor.placement.services
        assert psutil.Process(pid).nice() == 0


def test_waits_between_restarts_double_up_to_a_bound(mesh: Mesh) -> None:
    async def measure() -> list[float]:
        async with mesh.supervisor(EsperConfig()) as supervisor:
            return [supervisor._backoff(failures) for failures in (0, 1, 2, 20)]

    assert asyncio.run(measure()) == [0.2, 0.4, 0.8, MAX_BACKOFF_SECONDS]


async def test_what_a_killed_service_had_started_dies_with_it(mesh: Mesh, outside: Running) -> None:
    mesh.behave({"tezzeret": "grandchild"})
    async with mesh.supervisor(_only("tezzeret", outside)) as supervisor:
        await supervisor.start()
        grandchild = int((mesh.folder / "tezzeret.grandchild").read_text())
        assert psutil.pid_exists(grandchild)
        pid = supervisor.services["tezzeret"].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await mesh.until("tezzeret", "exited")
        await _gone(grandchild)


@pytest.mark.parametrize("what", ["wait", "stubborn"])
async def test_a_killed_supervisor_leaves_no_orphan(mesh: Mesh, what: str) -> None:
    """Whatever its children are: services, one with a child of its own, and a job that will not listen."""
    mesh.behave({"tezzeret": "grandchild"})
    config = EsperConfig(services=ServicesConfig(drain_seconds=0.5))
    (mesh.folder / "config.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    launcher = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.mesh_launcher",
        str(mesh.folder),
        what,
        stdout=subprocess.PIPE,
        cwd=_ROOT,
    )
    assert launcher.stdout is not None
    pids = json.loads(await asyncio.wait_for(launcher.stdout.readline(), 60))
    pids.append(int((mesh.folder / "tezzeret.grandchild").read_text()))
    assert len(pids) == 8
    launcher.kill()
    await launcher.wait()
    for pid in pids:
        await _gone(pid)


@contextlib.asynccontextmanager
async def _child(
    tmp_path: Path, script: str, on_message: Callable[[dict[str, Any]], None] = lambda _: None
) -> AsyncIterator[Child]:
    lifeline, life = os.pipe()
    child = Child([sys.executable, "-c", script], log=tmp_path / "log", lifeline=lifeline, on_message=on_message)
    try:
        yield child
    finally:
        await child.stop(0.0, asyncio.Event())
        os.close(lifeline)
        os.close(life)


async def test_messages_that_cannot_be_read_are_skipped(tmp_path: Path) -> None:
    script = (
        "import os; fd = int(os.environ['ESPER_PROGRESS_FD'])\n"
        "with os.fdopen(fd, 'wb') as out:\n"
        "    out.write(b'no json\\n' + b'{\"a\": 1}\\n' + b'x' * 3_000_000 + b'\\n' + b'{\"b\": 2}\\n' + b'{\"cut')\n"
    )
    heard: list[dict[str, Any]] = []
    async with _child(tmp_path, script, heard.append) as child:
        assert await child.ended == 0
    assert heard[0] == {"a": 1}
    assert heard[-1] == {"b": 2}


async def test_an_error_in_the_owners_callback_is_not_lost(tmp_path: Path) -> None:
    def refuse(message: dict[str, Any]) -> None:
        raise KeyError(message["a"])

    script = "import os; os.write(int(os.environ['ESPER_PROGRESS_FD']), b'{\"a\": 1}\\n')"
    async with _child(tmp_path, script, refuse) as child:
        with pytest.raises(KeyError):
            await child.ended


async def test_a_grandchild_that_keeps_the_pipe_does_not_hold_the_end(tmp_path: Path) -> None:
    script = (
        "import os, subprocess; fd = int(os.environ['ESPER_PROGRESS_FD'])\n"
        "kept = subprocess.Popen(['sleep', '1000'], pass_fds=(fd,), start_new_session=True)\n"
        "os.write(fd, b'{\"pid\": %d}\\n' % kept.pid)\n"
    )
    heard: list[dict[str, Any]] = []
    async with _child(tmp_path, script, heard.append) as child:
        assert await asyncio.wait_for(asyncio.shield(child.ended), 20) == 0
    os.kill(heard[0]["pid"], signal.SIGKILL)


async def test_a_dead_child_can_be_settled_and_stopped(tmp_path: Path) -> None:
    async with _child(tmp_path, "") as child:
        await asyncio.shield(child.ended)
        child.settle(cores=frozenset(os.sched_getaffinity(0)), niceness=3)


async def test_a_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    before = psutil.Process().num_fds()
    lifeline, life = os.pipe()
    with pytest.raises(FileNotFoundError):
        Child([str(tmp_path / "nothing")], log=tmp_path / "log", lifeline=lifeline, on_message=lambda _: None)
    os.close(lifeline)
    os.close(life)
    assert psutil.Process().num_fds() == before
