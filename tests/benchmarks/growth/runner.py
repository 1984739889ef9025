"""Makes the runs that are missing: workers of one thread each, one mesh for all of them, one file per finished run.

Killed at any moment it loses the runs under way and nothing else. Torch-free but for the tiny runs of ``records``.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from services.blueprints.signature import generate_keypair
from services.chassis.config.loader import dump, load_config
from services.chassis.config.schema import EsperConfig
from services.chassis.supervisor import Supervisor
from tests.benchmarks.growth.arms import Record, Unit, needs, ready
from tests.benchmarks.growth.protocol import TRAINED, Protocol
from tests.benchmarks.growth.records import Records
from tests.infrastructure.processes import ROOT

WORKERS: Final = 2
_STARTING_SECONDS: Final = 60.0


class RunFailedError(RuntimeError):
    """A run could not be made; the others stand."""


class Worker:
    """One worker process; gone with its ``close``."""

    def __init__(self, mesh: Path, data_dir: Path) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "tests.benchmarks.growth.worker", str(mesh), str(data_dir)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
            # Ctrl-C is the runner's: it ends the workers.
            start_new_session=True,
        )

    def make(self, order: Mapping[str, Any], step: Any) -> dict[str, Any]:
        """The record of ``order``; ``step(done, all)`` hears how far it is. Raises RunFailedError."""
        into, out = _pipe(self._process.stdin), _pipe(self._process.stdout)
        with contextlib.suppress(BrokenPipeError):
            into.write(json.dumps(order) + "\n")
            into.flush()
        for line in out:
            message = json.loads(line)
            if "record" in message:
                found: dict[str, Any] = message["record"]
                return found
            if "error" in message:
                raise RunFailedError(message["error"])
            step(message["step"], message["steps"])
        raise RunFailedError(f"the worker died with exit code {self._process.wait()}")

    def close(self) -> None:
        """Kill it: it keeps nothing that could be lost."""
        self._process.kill()
        self._process.communicate()


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None, "the worker was started with pipes"
    return stream


@contextlib.contextmanager
def shared_mesh(folder: Path) -> Iterator[Path]:
    """The six services as processes, in ``folder``; stopped in the end."""
    config: EsperConfig = load_config(None, overrides=["telemetry.traces=off"], environ={}).config
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(dump(config), encoding="utf-8")
    generate_keypair(folder / "state" / "keys")
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="mesh", daemon=True)
    thread.start()

    async def start() -> Supervisor:
        supervisor = Supervisor(config, folder)
        await supervisor.start()
        return supervisor

    supervisor = asyncio.run_coroutine_threadsafe(start(), loop).result(_STARTING_SECONDS)
    try:
        yield folder
    finally:
        asyncio.run_coroutine_threadsafe(supervisor.stop(), loop).result(_STARTING_SECONDS)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Runner:
    """The queue of runs.

    Args:
        protocol: What to run.
        records: Where finished runs are.
        data_dir: Folder of the official CIFAR files.
        final: The runs read the test set.
        smoke: ``protocol`` is a miniature.
        commit: Commit each finished run.
    """

    def __init__(
        self,
        protocol: Protocol,
        records: Records,
        data_dir: Path,
        *,
        final: bool = False,
        smoke: bool = False,
        commit: bool = False,
        console: Console | None = None,
    ) -> None:
        self.protocol = protocol
        self.records = records
        self.data_dir = data_dir
        self.final = final
        self.smoke = smoke
        self.commit = commit
        self.console = console or Console(stderr=True)
        self.failed: dict[str, str] = {}
        self._done: dict[str, Record] = dict(records.finished())
        self._lock = threading.Condition()
        self._waiting: list[Unit] = []
        self._running: set[str] = set()
        self._stopped = False

    def run(self, wanted: Sequence[Unit], *, workers: int = WORKERS, deadline: float | None = None) -> None:
        """Make what is missing of ``wanted`` and what that waits for. ``deadline``: seconds until no run is begun.

        Runs that failed are in ``failed``. KeyboardInterrupt passes, with all processes gone.
        """
        self._waiting = self._missing(wanted)
        if not self._waiting or deadline == 0:
            return
        ends = None if deadline is None else time.monotonic() + deadline
        with tempfile.TemporaryDirectory(prefix="esper-growth-") as name, contextlib.ExitStack() as stack:
            folder = Path(name) / "mesh"
            # They load while the services start.
            made = [Worker(folder, self.data_dir) for _ in range(min(workers, len(self._waiting)))]
            closing = stack.enter_context(contextlib.ExitStack())
            for worker in made:
                closing.callback(worker.close)
            stack.enter_context(shared_mesh(folder))
            # Before the services stop: a run must not end by missing them.
            stack.callback(closing.close)
            progress = stack.enter_context(self._progress())
            total = progress.add_task("all", total=len(self._waiting), left=self._left())
            threads = [
                threading.Thread(target=self._work, args=(worker, progress, total, ends), daemon=True)
                for worker in made
            ]
            for thread in threads:
                thread.start()
            try:
                for thread in threads:
                    while thread.is_alive():
                        thread.join(0.5)
            finally:
                with self._lock:
                    self._stopped = True
                    self._lock.notify_all()

    def _missing(self, wanted: Sequence[Unit]) -> list[Unit]:
        """Those of ``wanted`` that are not finished, each after what it waits for."""
        found: dict[str, Unit] = {}

        def add(unit: Unit) -> None:
            if unit.name in self._done or unit.name in found:
                return
            for need in needs(self.protocol, unit).values():
                add(need)
            found[unit.name] = unit

        for unit in wanted:
            add(unit)
        return list(found.values())

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description:32}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        return Progress(*columns, console=self.console, transient=True)

    def _left(self) -> str:
        """How long it will still take, by the runs of the same entry and arm, else of the entry, else of all."""
        seconds = estimate(self._waiting, self._done)
        return "" if seconds is None else f"about {seconds / WORKERS / 3600:.1f} h left"

    def _work(self, worker: Worker, progress: Progress, total: Any, ends: float | None) -> None:
        while (unit := self._take(ends)) is not None:
            task = progress.add_task(unit.name, total=None, left="")

            def step(done: int, of: int, task: Any = task) -> None:
                progress.update(task, completed=done, total=of)

            try:
                record = worker.make(self._order(unit), step)
                self._finished(unit, record)
            except RunFailedError as error:
                self._gave_up(unit, str(error))
            progress.remove_task(task)
            progress.update(total, advance=1, left=self._left())

    def _take(self, ends: float | None) -> Unit | None:
        """The next run that can be made; None when there is none any more."""
        with self._lock:
            while not self._stopped and self._waiting and (ends is None or time.monotonic() < ends):
                for unit in ready(self.protocol, self._waiting, self._done):
                    self._waiting.remove(unit)
                    self._running.add(unit.name)
                    return unit
                if not self._running:
                    break  # what is left waits for runs that failed
                self._lock.wait(1.0)
            return None

    def _finished(self, unit: Unit, record: Record) -> None:
        path = self.records.keep(unit.name, record)
        with self._lock:
            if self.commit:
                # One at a time: git locks its index.
                _commit([path, self.records.weights(unit.name), self.records.index], f"Run {unit.name} of the proof")
            self._done[unit.name] = record
            self._running.discard(unit.name)
            self._lock.notify_all()
        took, accuracy = record["wall_seconds"], record["validation_accuracy"]
        self.console.print(f"{unit.name}: {accuracy:.2f} % on validation, {took:.0f} s", highlight=False)

    def _gave_up(self, unit: Unit, error: str) -> None:
        with self._lock:
            self.failed[unit.name] = error
            self._running.discard(unit.name)
            self._lock.notify_all()
        self.console.print(f"{unit.name} failed: {error}", highlight=False)

    def _order(self, unit: Unit) -> dict[str, Any]:
        wanted = needs(self.protocol, unit)
        trained = wanted.get("trained")
        return {
            "protocol": self.protocol.name,
            "smoke": self.smoke,
            "final": self.final,
            "unit": asdict(unit),
            "given": {role: self._done[need.name] for role, need in wanted.items()},
            "weights": None if trained is None else str(self.records.weights(trained.name)),
            "save_weights": str(self.records.weights(unit.name)) if unit.entry == TRAINED else None,
        }


def estimate(waiting: Sequence[Unit], done: Mapping[str, Record]) -> float | None:
    """Seconds of one worker that ``waiting`` will take; None while nothing comparable is finished."""
    total = 0.0
    for unit in waiting:
        alike = [run for run in done.values() if run["arm"] == unit.arm]
        same = [run for run in alike if run["entry"] == unit.entry]
        taken = [run["wall_seconds"] for run in same or alike or done.values()]
        if not taken:
            return None
        total += statistics.fmean(taken)
    return total


def _commit(paths: Sequence[Path], message: str) -> None:
    there = [str(path) for path in paths if path.exists()]
    git = ["git", "-C", str(ROOT)]
    subprocess.run([*git, "add", "--", *there], check=True)
    subprocess.run([*git, "commit", "-q", "-m", message, "--", *there], check=True)
