"""A child's side of its pipes: progress that never waits, and a lifeline."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.chassis.process import BACKGROUND_CORES, LIFELINE_FD, PROGRESS_FD, Progress, bind_to_parent, step_aside

_ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """The parent's end of a progress pipe; the child's is in the environment."""
    read, write = os.pipe()
    monkeypatch.setenv(PROGRESS_FD, str(write))
    yield read
    os.close(read)


def _read_all(descriptor: int) -> list[bytes]:
    os.set_blocking(descriptor, False)
    data = b""
    try:
        while chunk := os.read(descriptor, 2**20):
            data += chunk
    except BlockingIOError:
        pass
    return data.split(b"\n")[:-1]


def test_messages_arrive_as_lines(pipe: int) -> None:
    progress = Progress()
    assert PROGRESS_FD not in os.environ  # the number means nothing to a grandchild
    assert progress.send({"epoch": 1, "loss": None})
    progress.close()
    progress.close()
    assert [json.loads(line) for line in _read_all(pipe)] == [{"epoch": 1, "loss": None}]
    assert not progress.send({"epoch": 2})
    assert progress.dropped == 1


def test_a_full_pipe_drops_and_counts_and_keeps_lines_whole(pipe: int) -> None:
    progress = Progress()
    message = {"filler": "x" * 70_001}
    sent = 0
    while progress.send(message):
        sent += 1
    assert not progress.send(message)
    assert progress.dropped == 2
    first = _read_all(pipe)
    assert progress.send({"after": True})
    lines = [line for line in _read_all(pipe) if line]
    assert json.loads(lines[-1]) == {"after": True}
    whole = [line for line in first if line.startswith(b'{"filler"') and line.endswith(b'"}')]
    # The line cut by the full pipe is completed before the next one.
    assert len(whole) + 1 >= sent
    assert all(json.loads(line) for line in lines[1:])
    progress.close()


def test_a_parent_that_left_does_not_disturb(monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.pipe()
    monkeypatch.setenv(PROGRESS_FD, str(write))
    progress = Progress()
    os.close(read)
    assert not progress.send({"epoch": 1})
    assert not progress.send({"epoch": 2})
    assert progress.dropped == 2


def test_without_a_pipe_everything_counts_as_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(PROGRESS_FD, raising=False)
    progress = Progress()
    assert not progress.send({})
    assert progress.dropped == 1


@pytest.mark.parametrize("named", ["one", "none", "gone"])
def test_a_thread_steps_aside_alone(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    cores = os.sched_getaffinity(0)
    chosen = {"one": {min(cores)}, "none": set(), "gone": {1023}}[named]
    monkeypatch.setenv(BACKGROUND_CORES, ",".join(str(core) for core in chosen))
    seen: list[set[int]] = []

    def aside() -> None:
        step_aside()
        seen.append(os.sched_getaffinity(0))

    thread = threading.Thread(target=aside)
    thread.start()
    thread.join()
    assert seen == [chosen if named == "one" else cores]
    assert os.sched_getaffinity(0) == cores


def test_nobody_supervises_a_process_without_a_lifeline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(LIFELINE_FD, raising=False)
    assert bind_to_parent(grace=1.0) is False


@pytest.mark.parametrize(("handler", "group", "code"), [("SIG_DFL", 0, 15), ("SIG_IGN", 0, 9), ("SIG_IGN", None, 9)])
def test_the_end_of_the_lifeline_is_the_end_of_the_child(handler: str, group: int | None, code: int) -> None:
    """Also of one that ignores SIGTERM, and of one in its parent's group, which is spared."""
    script = (
        "import signal, sys, time\n"
        "from services.chassis.process import bind_to_parent\n"
        f"signal.signal(signal.SIGTERM, signal.{handler})\n"
        "assert bind_to_parent(grace=0.1)\n"
        "print('bound', flush=True)\n"
        "time.sleep(1000)\n"
    )
    lifeline, life = os.pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=_ROOT,
        env=os.environ | {LIFELINE_FD: str(lifeline)},
        pass_fds=(lifeline,),
        process_group=group,
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"bound\n"
    os.close(lifeline)
    os.close(life)
    assert child.wait(20) == -code
    child.stdout.close()
    assert signal.Signals(code)
