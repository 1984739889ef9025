"""`train.py` as a user starts it: real processes, watched through what they write, disturbed on purpose."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import grpc
import psutil

from tests.infrastructure.processes import ROOT

SERVICES: Final = ("urza", "oona", "tamiyo", "kasmina", "tolaria", "tezzeret")

#: The quick start, shorter: one decision early, grafts judged soon, a checkpoint after every epoch. The kernel is
#: waited for, so that how fast this machine compiles decides nothing, and two such runs are equal bit for bit.
SHORT: Final = (
    "training.epochs=16",
    "training.checkpoint_every_epochs=1",
    "growth.wait_for_kernel=true",
    "growth.window=[0.05,0.3]",
    "growth.decisions=1",
    "growth.evaluation.min_epochs=4",
    "compare=[]",
)
_NAMES: Final = {"services.tolaria.training_process": "training", "services.tolaria.mesh_process": "mesh"}
_T = TypeVar("_T")
_LOOK_SECONDS: Final = 0.02


@dataclass(frozen=True)
class Ended:
    """How a command ended. ``summary`` is the JSON line on standard output, empty where there was none."""

    code: int
    summary: Mapping[str, Any]
    out: str
    err: str


class Run:
    """One `train.py`, started at once. ``output`` holds its run folder; the command's words go to files beside it."""

    def __init__(
        self,
        output: Path,
        *overrides: str,
        config: str = "configs/quickstart.yaml",
        arguments: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self._before = set(self._folders(output))
        self._output = output
        number = len(list(output.glob("*.out")))
        self._out, self._err = output / f"{number}.out", output / f"{number}.err"
        command = [sys.executable, "train.py", "--json", *arguments]
        if "--resume" not in arguments:
            command += ["--config", config, "--output", str(output)]
            command += [part for override in overrides for part in ("--set", override)]
        with self._out.open("wb") as out, self._err.open("wb") as err:
            # A group of its own: a signal for it must not reach pytest, nor pytest's Ctrl-C it.
            self._process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, **(environment or {})},
                process_group=0,
            )
        self.launcher = psutil.Process(self._process.pid)
        self._resumed = Path(arguments[arguments.index("--resume") + 1]) if "--resume" in arguments else None
        self._seen: dict[int, psutil.Process] = {}

    @staticmethod
    def _folders(output: Path) -> list[Path]:
        # `latest` is a link to one of them.
        return [path.parent for path in output.glob("*/format.json") if not path.parent.is_symlink()]

    # ---- watching --------------------------------------------------------------------------------------------------

    @property
    def folder(self) -> Path:
        """The run folder."""
        if self._resumed is not None:
            return self._resumed
        return self.until(lambda: next(iter(set(self._folders(self._output)) - self._before), None), "a run folder")

    def until(self, look: Callable[[], _T | None], what: str, timeout: float = 120.0) -> _T:
        """The first true answer of ``look``; fails when the command ends or the time is over before."""
        deadline = time.monotonic() + timeout
        while True:
            ended = self._process.poll() is not None
            found = look()
            if found:
                return found
            assert not ended, f"train.py ended with {self._process.returncode} before {what}:\n{self._tail()}"
            assert time.monotonic() < deadline, f"no {what} within {timeout:g} s:\n{self._tail()}"
            time.sleep(_LOOK_SECONDS)

    def _tail(self) -> str:
        return "\n".join((self._out.read_text() + self._err.read_text()).splitlines()[-30:])

    def until_epoch(self, epoch: int, arm: str = "grown") -> None:
        """Wait until ``epoch`` epochs of ``arm`` are over."""
        self.until(lambda: len(self.metrics(arm)) >= epoch, f"end of epoch {epoch}")

    def until_training(self) -> None:
        """Wait until all services are serving and the training process has attached to its gateways."""
        self.until(lambda: (self.folder / "metrics.jsonl").exists() or self.lines("events.jsonl"), "training")

    def told(self) -> str:
        """What it has told people so far."""
        return self._err.read_text()

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The JSON lines of a file of the run folder; what is still being written is left out."""
        return json_lines(self.folder / name)

    def metrics(self, arm: str = "grown") -> list[dict[str, Any]]:
        """One object per finished epoch of ``arm``."""
        return [line for line in self.lines("metrics.jsonl") if line["arm"] == arm]

    def processes(self) -> dict[str, psutil.Process]:
        """The services and the process that trains, by name, as they live now."""
        found: dict[str, psutil.Process] = {}
        folder = str(self.folder)
        with contextlib.suppress(psutil.NoSuchProcess):
            for child in self.launcher.children(recursive=True):
                self._seen[child.pid] = child
                with contextlib.suppress(psutil.NoSuchProcess):
                    words = child.cmdline()
                    if words[1:2] == ["-m"] and folder in words:
                        found[_NAMES.get(words[2], words[2].rpartition(".")[2])] = child
        return found

    def process(self, name: str) -> psutil.Process:
        """One of them; waits until it is there."""
        return self.until(lambda: self.processes().get(name), f"process {name}")

    def address(self, service: str) -> str:
        """Where ``service`` listens."""
        path = self.folder / "addresses.json"
        self.until(path.exists, "addresses.json")
        return str(json.loads(path.read_text())[service])

    @contextlib.contextmanager
    def channel(self, service: str) -> Iterator[grpc.Channel]:
        """A plain channel to ``service``."""
        with grpc.insecure_channel(self.address(service)) as channel:
            yield channel

    # ---- disturbing ------------------------------------------------------------------------------------------------

    def kill(self, name: str) -> int:
        """Kill -9 a service or the training process; returns the id it had."""
        process = self.process(name)
        process.send_signal(signal.SIGKILL)
        return process.pid

    def until_back(self, name: str, before: int) -> None:
        """Wait until ``name`` runs again, as another process than ``before``, and serves."""

        def serving() -> bool:
            return any(line.get("pid", before) != before and "address" in line for line in self._log(name)[-40:])

        self.until(serving, f"return of {name}")

    def _log(self, name: str) -> list[dict[str, Any]]:
        return json_lines(self.folder / "logs" / f"{name}.log")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to `train.py` alone, as a terminal or a service manager does."""
        self.processes()
        self._process.send_signal(number)

    # ---- ending ----------------------------------------------------------------------------------------------------

    def wait(self, timeout: float = 150.0) -> Ended:
        """How it ended."""
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"train.py is still running after {timeout:g} s:\n{self._tail()}") from None
        out, err = self._out.read_text(), self._err.read_text()
        last = out.strip().splitlines()[-1:]
        return Ended(code, json.loads(last[0]) if last else {}, out, err)

    def left_over(self) -> list[psutil.Process]:
        """Processes of this run that are still there. Call :meth:`processes` while it runs, or few are known."""
        found = [process for process in self._seen.values() if _lives(process)]
        folders = {str(path) for path in set(self._folders(self._output)) - self._before} | {str(self._resumed)}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.pid != os.getpid() and folders.intersection(process.cmdline()):
                    found.append(process)
        return found

    def end(self) -> None:
        """End it now, whatever state it is in: for tests that failed half-way."""
        if self._process.poll() is None:
            for child in self.launcher.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait()


@contextlib.contextmanager
def running(output: Path, *overrides: str, **options: Any) -> Iterator[Run]:
    """A run that is ended with the block at the latest."""
    run = Run(output, *overrides, **options)
    try:
        yield run
    finally:
        run.end()


def _lives(process: psutil.Process) -> bool:
    """Whether it still runs; a zombie, whose new parent only has to read its exit code, does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON objects of a file of lines, other lines and a half-written last one left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def validation_figures(metrics: Sequence[Mapping[str, Any]]) -> list[tuple[Any, ...]]:
    """What two equal runs share to the last bit, epoch by epoch."""
    keys = ("epoch", "step", "train_loss", "validation_loss", "validation_accuracy", "parameters", "training_flops")
    return [tuple(line[key] for key in keys) for line in metrics]
