"""Launches a run: folder, keys, mesh, training process; and tells people and programs how it went.

Torch-free. Exit codes: 0 done, 1 training failed, 2 bad configuration or usage, 3 a service could not start, 130 and
143 interrupted by SIGINT or SIGTERM with a checkpoint saved.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import signal
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

import grpc.aio
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.blueprints.signature import generate_keypair
from services.chassis import telemetry
from services.chassis.channel import ChannelFactory
from services.chassis.config.loader import dump
from services.chassis.config.schema import EsperConfig
from services.chassis.errors import EsperError, Reason
from services.chassis.files import write_atomically
from services.chassis.supervisor import Event, Job, Supervisor
from services.tolaria.progress import Progress, StatusProgress, StepProgress, SummaryProgress, decode
from services.tolaria.report import write_report
from services.tolaria.run_folder import RunFolder
from services.tolaria.view import LiveView, PlainView, QuietView, View

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NO_SERVICE: Final = 3
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
_CHECK_SECONDS: Final = 5.0


@dataclass(frozen=True, kw_only=True)
class Options:
    """How to launch. ``output`` is "normal", "verbose" or "quiet"; ``json`` keeps standard output for one JSON line."""

    output: str = "normal"
    json: bool = False
    services_only: bool = False

    @property
    def stream(self) -> TextIO:
        """Where people read."""
        return sys.stderr if self.json else sys.stdout


@dataclass
class _Story:
    """What the training process has told so far."""

    summary: dict[str, Any] | None = None
    failure: str = ""
    first_step: float | None = None
    startup: dict[str, Any] = field(default_factory=dict)
    state: str = "starting"


class Launcher:
    """One launch of one run. Use :func:`train`."""

    def __init__(self, folder: RunFolder, config: EsperConfig, options: Options, *, resume: bool) -> None:
        self._folder = folder
        self._config = config
        self._options = options
        self._resume = resume
        self._story = _Story()
        self._interrupted: signal.Signals | None = None
        self._began = psutil.Process().create_time()
        self._supervisor: Supervisor | None = None
        self._view: View = PlainView(options.stream)

    async def run(self) -> int:
        """Everything; returns the exit code."""
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop, number)
        try:
            async with Supervisor(self._config, self._folder.path, on_event=self._hear_mesh) as supervisor:
                self._supervisor = supervisor
                self._view = self._make_view(supervisor)
                self._view.start()
                try:
                    code = await self._supervise(supervisor)
                finally:
                    self._view.stop()
        except EsperError as error:
            return self._could_not_start(error)
        finally:
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
        return self._finish(supervisor, code)

    async def _supervise(self, supervisor: Supervisor) -> int:
        if self._options.services_only:
            await supervisor.start()
            self._write_mesh(supervisor)
            self._say_how_to_call(supervisor)
            return await supervisor.wait()
        job = Job(
            name="training",
            command=self._command(resume=self._resume),
            restart=self._after_crash,
            on_progress=self._hear,
            threads=self._config.training.threads,
        )
        await supervisor.start(job)
        self._write_mesh(supervisor)
        return await supervisor.wait()

    def _command(self, *, resume: bool) -> Sequence[str]:
        command = [sys.executable, "-m", "services.tolaria.training_process", "--run-dir", str(self._folder.path)]
        return [*command, "--resume"] if resume else command

    def _after_crash(self, code: int, restarts: int) -> Sequence[str] | None:
        """Resume a process that was killed; one that ended by itself has said why and would end so again."""
        if code >= 0 or restarts >= self._config.training.max_restarts:
            return None
        self._view.say(f"training process {signal.Signals(-code).name}: resuming from its last checkpoint")
        return self._command(resume=True)

    def _stop(self, number: signal.Signals) -> None:
        """Once: in good order, with a checkpoint. Twice: now."""
        again = self._interrupted is not None
        self._interrupted = self._interrupted or signal.Signals(number)
        if self._supervisor is not None:
            self._supervisor.request_stop(now=again)
        if not self._options.services_only:
            self._view.say("stopping now" if again else "stopping: saving a checkpoint (again: stop now)")

    # ---- listening -------------------------------------------------------------------------------------------------

    def _hear(self, message: Mapping[str, Any]) -> None:
        known = decode(json.dumps(message))
        if known is None:
            return
        self._note(known)
        self._view.hear(known)

    def _note(self, message: Progress) -> None:
        story = self._story
        match message:
            case SummaryProgress():
                story.summary = dict(message.summary)
            case StatusProgress():
                story.state = message.state
                story.startup.update(message.detail.get("startup", {}))
                if message.state == "failed":
                    story.failure = message.message
            case StepProgress() if story.first_step is None:
                story.first_step = time.time() - self._began
                self._view.say(self._startup_line())
            case _:
                pass

    def _hear_mesh(self, event: Event) -> None:
        self._view.mesh(event)
        if event.kind in ("restarting", "gave_up") and self._supervisor is not None:
            self._write_mesh(self._supervisor)

    def _startup_line(self) -> str:
        """Where the time to the first step went."""
        parts = [f"{name} {seconds:.1f}" for name, seconds in self._story.startup.items()]
        if self._supervisor is not None:
            served = {
                status.name: status.serving_after - (status.spawned_after or 0.0)
                for status in self._supervisor.services.values()
                if status.serving_after is not None
            }
            ready = max((s.serving_after or 0.0 for s in self._supervisor.services.values()), default=0.0)
            parts.insert(0, f"services {ready:.1f} ({', '.join(f'{n} {s:.1f}' for n, s in served.items())})")
        return f"first step after {self._story.first_step or 0.0:.1f} s: {', '.join(parts)}"

    # ---- telling ---------------------------------------------------------------------------------------------------

    def _make_view(self, supervisor: Supervisor) -> View:
        stream = self._options.stream
        if self._options.output == "quiet":
            return QuietView(stream)
        if self._options.output == "verbose" or not stream.isatty() or self._options.services_only:
            return PlainView(stream, verbose=self._options.output == "verbose")
        return LiveView(stream, supervisor.services, run=self._folder.run_id)

    def _write_mesh(self, supervisor: Supervisor) -> None:
        """What the report needs of the mesh: services with their restarts, what happened, where start-up time went."""
        content = {
            "services": {name: dataclasses.asdict(status) for name, status in supervisor.services.items()},
            "events": [dataclasses.asdict(event) for event in supervisor.events],
            "training_restarts": supervisor.job_restarts,
            "first_step_seconds": self._story.first_step,
            "startup": self._story.startup,
        }
        with contextlib.suppress(EsperError):  # a full disk costs a part of the report, never the run
            write_atomically(self._folder.path / "mesh.json", json.dumps(content, indent=1) + "\n")

    def _say_how_to_call(self, supervisor: Supervisor) -> None:
        for status in supervisor.services.values():
            self._view.say(f"{status.name:<9} grpcurl -plaintext {status.address} list")
        self._view.say("Ctrl-C ends them")

    def _could_not_start(self, error: EsperError) -> int:
        self._view.stop()
        log = error.metadata.get("log")
        sys.stderr.write(f"train.py: {error.message}{f' (log: {log})' if log else ''}\n")
        if self._options.json:
            self._print_json(self._summary(None, status="failed"))
        return EXIT_NO_SERVICE

    def _finish(self, supervisor: Supervisor, code: int) -> int:
        self._write_mesh(supervisor)
        if self._options.services_only:
            return EXIT_DONE
        status, exit_code = self._outcome(code)
        summary = self._summary(supervisor, status=status)
        with contextlib.suppress(EsperError):  # it is printed all the same
            write_atomically(self._folder.path / "summary.json", json.dumps(summary, indent=1) + "\n")
        try:
            write_report(self._folder.path)
        except EsperError as error:
            summary["report"] = None
            self._view.say(f"no report: {error.message}")
        self._tell_result(summary, status, exit_code)
        if self._options.json:
            self._print_json(summary)
        return exit_code

    def _outcome(self, code: int) -> tuple[str, int]:
        if code == EXIT_DONE and self._story.summary is not None:
            return str(self._story.summary.get("status", "succeeded")), EXIT_DONE
        if self._interrupted is not None:
            return "interrupted", 128 + self._interrupted
        return "failed", EXIT_FAILED

    def _summary(self, supervisor: Supervisor | None, *, status: str) -> dict[str, Any]:
        """The JSON object that scripts rely on; what was not measured is null."""
        unknown: dict[str, Any] = {
            "epochs": None,
            "adaptations": {"started": None, "fossilized": None, "culled": None},
            "seeds": [],
            "parameters": {"host": None, "final": None},
            "flops": {"training": None, "growth": None},
            "accuracy": {"grown": None, "host": None, "bigger": None},
            "events": {"published": None, "dropped": None},
        }
        services = supervisor.services.values() if supervisor is not None else ()
        return {
            "run_id": self._folder.run_id,
            "run_dir": str(self._folder.path),
            **unknown,
            **(self._story.summary or {}),
            "status": status,
            "reason": self._story.failure,
            "startup_seconds": self._story.first_step,
            "services": {s.name: {"address": s.address, "restarts": s.restarts} for s in services},
            "report": str(self._folder.path / "report.html"),
        }

    def _tell_result(self, summary: Mapping[str, Any], status: str, exit_code: int) -> None:
        for line in result_lines(summary):
            self._view.say(line)
        if exit_code == EXIT_FAILED:
            reason = self._story.failure or f"see {self._folder.path / 'logs' / 'training.log'}"
            sys.stderr.write(f"train.py: training failed: {reason}\n")
        elif status == "interrupted":
            self._view.say(f"interrupted; go on with: python train.py --resume {self._folder.path}")

    def _print_json(self, summary: Mapping[str, Any]) -> None:
        sys.stdout.write(json.dumps(summary) + "\n")
        sys.stdout.flush()


def result_lines(summary: Mapping[str, Any]) -> list[str]:
    """The result as people read it: the comparison, what growth cost, and whether there was a gain at all."""
    lines = []
    arms = summary.get("arms") or {}
    if arms:
        lines.append(f"{'':<8}{'test %':>8}{'parameters':>12}{'training FLOPs':>16}{'seconds':>9}")
        lines += [_arm_line(name, figures) for name, figures in arms.items()]
    accuracy = summary["accuracy"]
    grown, host = accuracy["grown"], accuracy["host"]
    if grown is not None and host is not None:
        difference = grown - host
        verdict = f"growth gained {difference:+.2f} points" if difference > 0 else "no gain from growth"
        lines.append(f"{verdict} over the same host (one run: differences below 0.7 points are noise)")
    seconds = summary.get("growth_seconds")
    if seconds is not None:
        lines.append(f"growth cost {seconds:.1f} s of wall clock in scoring, counterfactuals and surgery")
    started = summary["adaptations"]["started"]
    if started is not None:
        kept, culled = summary["adaptations"]["fossilized"], summary["adaptations"]["culled"]
        lines.append(f"seeds: {started} started, {kept} fossilized, {culled} culled")
    lines.append(f"report: {summary['report']}")
    return lines


def _arm_line(name: str, figures: Mapping[str, Any]) -> str:
    def show(key: str, form: str) -> str:
        value = figures.get(key)
        return "-" if value is None else format(value, form)

    return (
        f"{name:<8}{show('test_accuracy', '.2f'):>8}{show('parameters', ',d'):>12}"
        f"{show('training_flops', '.3g'):>16}{show('seconds', '.1f'):>9}"
    )


def train(folder: RunFolder, config: EsperConfig, options: Options, *, resume: bool) -> int:
    """Launch a run in its folder; returns the exit code."""
    state = config.run.state_dir or folder.path / "state"
    generate_keypair(state / "keys")
    return asyncio.run(Launcher(folder, config, options, resume=resume).run())


def check_services(config: EsperConfig, options: Options) -> int:
    """Start, or dial, every service; print how each is. Returns 0, or 3 when one is not serving."""
    with tempfile.TemporaryDirectory(prefix="esper-check-") as name:
        run_dir = Path(name)
        write_atomically(run_dir / "config.yaml", dump(config), fsync=False)
        generate_keypair((config.run.state_dir or run_dir / "state") / "keys")
        try:
            rows = asyncio.run(_check(config, run_dir))
        except EsperError as error:
            sys.stderr.write(f"train.py: {error.message}\n")
            return EXIT_NO_SERVICE
    for service, row in rows.items():
        options.stream.write(f"{service:<9} {row['state']:<12} {row['address']:<22} {row['latency_ms']:>7.2f} ms\n")
    if options.json:
        sys.stdout.write(json.dumps({"services": rows}) + "\n")
    return EXIT_DONE if all(row["state"] == "SERVING" for row in rows.values()) else EXIT_NO_SERVICE


async def _check(config: EsperConfig, run_dir: Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    tracer = telemetry.setup("train", config.telemetry, None, None)
    async with Supervisor(config, run_dir) as supervisor:
        await supervisor.start()
        async with contextlib.AsyncExitStack() as stack:
            channels = ChannelFactory(config.services, tracer, run_dir=run_dir, run_id=None)
            stack.push_async_callback(channels.close)
            for name, status in supervisor.services.items():
                stub = health_pb2_grpc.HealthStub(channels.channel(name))
                started = time.perf_counter()
                try:
                    answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_CHECK_SECONDS)
                    state = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
                except grpc.aio.AioRpcError as error:
                    state = error.code().name
                milliseconds = (time.perf_counter() - started) * 1e3
                rows[name] = {"state": state, "address": status.address, "latency_ms": milliseconds}
    return rows


def plan_of(config: EsperConfig) -> str:
    """What a run would do, in words."""
    growth, services = config.growth, config.services
    own = [n for n in ("urza", "tezzeret", "tamiyo", "oona", "kasmina", "tolaria") if not getattr(services, n).address]
    lines = [
        f"plan: start {', '.join(own) or 'no service'} on {services.host}",
        f"      train {config.model.name} on {config.data.name} for {config.training.epochs} epochs",
    ]
    if growth.enabled:
        start, end = (round(share * config.training.epochs) for share in growth.window)
        kind = "flops" if growth.budget.flops is not None else "parameters"
        limit = growth.budget.flops or growth.budget.parameters
        lines.append(
            f"      grow by {growth.policy}: {growth.decisions} decisions between epochs {start} and {end}, "
            f"to at most {limit:g} times the host's {kind}"
        )
    else:
        lines.append("      without growth")
    lines.append(f"      then compare with {', '.join(config.compare) or 'nothing'}, and read the test set once")
    return "\n".join(lines) + "\n"


def resume_folder(run: str, config: EsperConfig) -> RunFolder:
    """The folder of a run to go on with.

    Raises:
        EsperError: RUN_FOLDER_INVALID, RUN_LOCKED.
    """
    folder = RunFolder.find(run, config.run.output_dir.absolute())
    if not any((folder.path / "checkpoints").glob("*/manifest.json")):
        folder.close()
        raise EsperError(
            f"{folder.path}: it has no checkpoint to resume from; start the run anew",
            reason=Reason.CHECKPOINT_NOT_FOUND,
        )
    return folder
