"""The scripts of .ci: a drift is found, a hole in the coverage fails the run, set-up refuses what it cannot use."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import psutil
import pytest

from tests.infrastructure.processes import ROOT


def script(name: str) -> ModuleType:
    """A module of .ci, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*command: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env=None if env is None else dict(env), capture_output=True, text=True, check=False
    )


def report(**percent: float) -> dict[str, object]:
    """What `coverage json` writes, for files named by keyword (`__` stands for `/`)."""
    files = {
        f"{name.replace('__', '/')}.py": {"summary": {"percent_covered": value}} for name, value in percent.items()
    }
    return {"files": files, "totals": {"percent_covered": 95.0}}


def test_coverage_gate_tells_goals_from_floors() -> None:
    gate = script("coverage_gate")
    whole = report(train=100.0, services__urza__library=90.0, services__chassis__config__schema=100.0)
    assert gate.shortfalls(whole) == ([], [])
    assert gate.shortfalls(report(services__tolaria__trainer=99.9, services__urza__library=86.9, train=97.0)) == (
        [
            "services/urza/library.py: 86.9 % is below its floor of 87 %",
            "train.py: 97.0 % is below its floor of 98 %",
        ],
        ["services/tolaria/trainer.py: 99.9 % is below its goal of 100 %"],
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what generation needs, with the environment of this one."""
    for folder in (".ci", "proto", "services/contracts"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def generate(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, str(checkout / ".ci/generate.py"), *arguments, cwd=checkout)


def test_committed_contracts_are_what_is_generated(checkout: Path) -> None:
    done = generate(checkout, "--check")
    assert (done.returncode, done.stdout) == (0, "")


def test_a_changed_contract_is_a_drift_until_generated(checkout: Path) -> None:
    proto = checkout / "proto/esper/common/v1/common.proto"
    proto.write_text(proto.read_text(encoding="utf-8") + "\n// New.\nmessage Added {}\n", encoding="utf-8")
    (checkout / "services/contracts/esper/common/v1/gone_pb2.py").write_text("", encoding="utf-8")
    drift = generate(checkout, "--check", "common")
    assert drift.returncode == 1
    assert "common_pb2.py" in drift.stdout
    assert "gone_pb2.py" in drift.stdout
    assert "1 removed" in generate(checkout, "common").stdout
    assert generate(checkout, "--check", "common").returncode == 0
    assert "0 changed, 0 removed" in generate(checkout, "common").stdout


def test_a_broken_contract_changes_nothing(checkout: Path) -> None:
    before = (checkout / "services/contracts/esper/common/v1/common_pb2.py").read_bytes()
    (checkout / "proto/esper/common/v1/common.proto").write_text("message {", encoding="utf-8")
    done = generate(checkout, "common")
    assert done.returncode == 1
    assert "protoc failed" in done.stderr
    assert "common.proto" in done.stderr
    assert (checkout / "services/contracts/esper/common/v1/common_pb2.py").read_bytes() == before


def test_an_unknown_component_is_named(checkout: Path) -> None:
    done = generate(checkout, "nowhere")
    assert done.returncode == 1
    assert "no such component: proto/esper/nowhere" in done.stderr


def test_breaking_change_against_the_baseline_is_refused(checkout: Path, tmp_path: Path) -> None:
    buf = Path(sys.executable).parent / "buf"
    shutil.copy(ROOT / "buf.yaml", checkout)
    image = tmp_path / "baseline.binpb"
    assert run(str(buf), "build", "-o", str(image), cwd=checkout).returncode == 0
    proto = checkout / "proto/esper/common/v1/common.proto"
    text = proto.read_text(encoding="utf-8")
    assert "bytes value = 2;" in text
    proto.write_text(text.replace("bytes value = 2;", "string value = 2;"), encoding="utf-8")
    done = run(str(buf), "breaking", "--against", str(image), cwd=checkout)
    assert done.returncode != 0
    assert "value" in done.stdout


def test_help_lists_every_command() -> None:
    done = run("make", "--no-print-directory", "help")
    assert done.returncode == 0
    for command in ("run", "test", "test-fast", "lint", "proto", "format", "clean"):
        assert f"\n  {command} " in done.stdout


def test_setup_names_a_python_that_is_too_old(tmp_path: Path) -> None:
    for name in (".ci", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    old = tmp_path / "old-python"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.8.1\nexit 1\n', encoding="utf-8")
    old.chmod(0o755)
    done = run("bash", ".ci/setup.sh", "python", cwd=tmp_path, env={**os.environ, "PYTHON": str(old)})
    assert done.returncode == 1
    assert done.stderr.strip() == f"setup: Python 3.11 or newer is needed, {old} is 3.8.1 (set PYTHON to another)"


@pytest.mark.parametrize("name", ["setup.sh", "test.sh"])
def test_wrong_usage_is_exit_code_2(name: str, tmp_path: Path) -> None:
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    done = run("bash", f".ci/{name}", "nonsense", cwd=tmp_path)
    assert done.returncode == 2
    assert "usage" in done.stderr


def test_missing_programs_fail_ci_and_are_one_line_each(tmp_path: Path) -> None:
    for name in (".ci", "requirements", "deploy"):
        shutil.copytree(ROOT / name, tmp_path / name)
    # A PATH with the programs of a bare system: no Java, Go, Node, and no apt to bring them.
    bare = tmp_path / "bin"
    bare.mkdir()
    programs = ("bash", "cat", "cut", "dirname", "flock", "grep", "head", "id", "ls", "mkdir", "printf", "sed")
    for program in (*programs, "sha256sum", "sort"):
        found = shutil.which(program)
        assert found is not None
        (bare / program).symlink_to(found)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv/bin").mkdir()
    (tmp_path / ".venv/bin/python").symlink_to(sys.executable)
    wanted = run("bash", "-c", "cat requirements/bootstrap.txt requirements/lock.txt | sha256sum | cut -d' ' -f1")
    (tmp_path / ".venv/.esper-stamp").write_text(wanted.stdout.strip(), encoding="utf-8")
    for ci, code in (("false", 0), ("true", 1)):
        done = run("bash", ".ci/setup.sh", "tests", cwd=tmp_path, env={"PATH": str(bare), "CI": ci})
        lines = done.stderr.splitlines()
        assert done.returncode == code
        for program in ("Java 17", "Maven", "Go 1.23", "Node 20"):
            assert len([line for line in lines if line.startswith(f"setup: {program} is missing:")]) == 1, lines


def until(look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not look():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


ENDLESS = """
import os, signal, subprocess, sys, time
from pathlib import Path

def test_endless():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    Path("pids.new").write_text(f"{os.getpid()} {child.pid}")
    Path("pids.new").rename("pids")
    time.sleep(600)
"""


@pytest.mark.parametrize(("asked", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_test_run_ends_all_that_it_started(tmp_path: Path, asked: signal.Signals, code: int) -> None:
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    for done_elsewhere in ("lint.sh", "clients.sh"):
        (tmp_path / ".ci" / done_elsewhere).write_text("#!/bin/sh\n", encoding="utf-8")
    (tmp_path / ".venv").symlink_to(Path(sys.prefix))
    (tmp_path / "test_endless.py").write_text(ENDLESS, encoding="utf-8")
    pids = tmp_path / "pids"
    command = ["bash", ".ci/test.sh", "all", "test_endless.py"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as tests:
        try:
            until(pids.exists)
            tests.send_signal(asked)
            assert tests.wait(timeout=30) == code
        finally:
            tests.kill()
    # Not even those that refuse to end, nor those that have a session of their own.
    until(lambda: all(has_ended(int(pid)) for pid in pids.read_text(encoding="utf-8").split()))


def test_a_process_left_behind_is_named_and_ended() -> None:
    run_id = f"test-{os.getpid()}"
    leftovers = str(ROOT / ".ci/leftovers.py")
    assert run(sys.executable, leftovers, run_id, "0").returncode == 0
    marked = {**os.environ, "ESPER_TEST_RUN": run_id}
    with subprocess.Popen([sys.executable, "-c", "input()"], env=marked, stdin=subprocess.PIPE) as orphan:
        done = run(sys.executable, leftovers, run_id, "0", env=marked)
        assert done.returncode == 1
        assert f"process {orphan.pid} outlived the tests" in done.stdout
        assert orphan.wait(timeout=30) == -signal.SIGKILL
    assert run(sys.executable, leftovers).returncode == 2
