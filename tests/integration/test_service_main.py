"""A service's ``main`` as a process: started by hand, stopped by signals, refused with one clear line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.chassis.channel import ADDRESSES_DIR
from services.chassis.telemetry import read_traces

pytestmark = pytest.mark.parallel
_ROOT = Path(__file__).resolve().parents[2]


@contextlib.contextmanager
def _service(*arguments: str, cwd: Path, path: str = "") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.support.mesh_service", "urza", *arguments]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [path, str(_ROOT)]))}
    with subprocess.Popen(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = json.loads(process.stdout.readline())
    assert line["service"] == "urza"
    assert line["pid"] == process.pid
    return str(line["address"])


def _serves(address: str) -> bool:
    with grpc.insecure_channel(address) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=10)
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_configuration_alone_starts_a_service(tmp_path: Path, number: signal.Signals) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("run: {seed: 1}\n")
    with _service("--config", str(config), cwd=tmp_path) as process:
        assert _serves(_address(process))
        assert (tmp_path / "esper-state" / "urza").is_dir()
        process.send_signal(number)
        assert process.wait(20) == 0
        assert process.stderr is not None
        lines = [json.loads(line) for line in process.stderr.read().splitlines()]
    assert [line["message"] for line in lines if line["logger"] == "esper.service"] == ["serving", "draining"]


def test_state_and_address_go_where_they_are_wanted(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "run-1"
    run_dir.mkdir(parents=True)
    (run_dir / "behavior.json").write_text("{}")
    with _service("--run-dir", str(run_dir), cwd=tmp_path) as process:
        address = _address(process)
        assert (run_dir / ADDRESSES_DIR / "urza").read_text().strip() == address
        assert (run_dir / "state" / "urza").is_dir()
    config = tmp_path / "config.yaml"
    config.write_text(f"run: {{state_dir: '{tmp_path / 'kept'}'}}\n")
    wanted = tmp_path / "new" / "address"
    with _service("--config", str(config), "--address-file", str(wanted), cwd=tmp_path) as process:
        assert _address(process) == wanted.read_text().strip()
        assert (tmp_path / "kept" / "urza").is_dir()


def test_the_second_of_two_interrupts_does_not_wait(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("services: {drain_seconds: 1000}\n")
    with _service("--config", str(config), cwd=tmp_path) as process:
        address = _address(process)
        with grpc.insecure_channel(address) as channel:
            # Reflection keeps a stream open for as long as its client does: the drain waits for it.
            from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

            held = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
                iter(_forever(reflection_pb2.ServerReflectionRequest(list_services="")))
            )
            next(held)
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            while "draining" not in process.stderr.readline():
                pass
            process.send_signal(signal.SIGINT)
            assert process.wait(20) == 130


def _forever(first: object) -> Iterator[object]:
    import threading

    yield first
    threading.Event().wait(60)


def test_a_bad_configuration_is_one_clear_message_and_code_2(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("services: {drain_second: 1}\n")
    with _service("--config", str(config), cwd=tmp_path) as process:
        assert process.wait(20) == 2
        assert process.stderr is not None
        said = process.stderr.read()
    assert "drain_second" in said
    assert "config.yaml:1" in said
    assert "Traceback" not in said


def test_a_port_in_use_is_one_clear_line_and_code_3(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with _service("--port", str(port), cwd=tmp_path) as process:
            assert process.wait(20) == 3
            assert process.stderr is not None
            said = process.stderr.read()
    assert said.count("\n") == 1
    assert f"127.0.0.1:{port}" in said
    assert "PORT_IN_USE" in said


def test_a_defect_at_the_start_is_logged_and_code_1(tmp_path: Path) -> None:
    (tmp_path / "behavior.json").write_text(json.dumps({"urza": "bug"}))
    with _service("--run-dir", str(tmp_path), cwd=tmp_path) as process:
        assert process.wait(20) == 1
        assert process.stderr is not None
        assert "KeyError" in json.loads(process.stderr.read())["exception"]


def test_a_reader_that_left_does_not_stop_a_service(tmp_path: Path) -> None:
    address_file = tmp_path / "address"
    with _service("--address-file", str(address_file), cwd=tmp_path) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        while "serving" not in process.stderr.readline():
            pass
        assert _serves(address_file.read_text().strip())


def test_a_service_runs_without_the_faster_loop(tmp_path: Path) -> None:
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "uvloop.py").write_text("raise ImportError('not installed')\n")
    with _service(cwd=tmp_path, path=str(shadow)) as process:
        assert _serves(_address(process))
        process.terminate()
        assert process.wait(20) == 0
    assert not read_traces(tmp_path)
