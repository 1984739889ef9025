"""Launches a run: keys, mesh, training process; and tells people and programs how it went.

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

import psutil

from services.blueprints.signature import SignatureError, generate_keypair
from services.chassis.config.loader import LoadedConfig, dotted, dump, inline, leaves, render_effective
from services.chassis.config.schema import EsperConfig
from services.chassis.errors import EsperError, Reason
from services.chassis.files import storage_error, write_atomically
from services.chassis.supervisor import NEEDS, Event, Job, State, Supervisor
from services.tolaria.accounting import BUDGET, CACHE, FLOPS
from services.tolaria.progress import EpochProgress, Progress, StatusProgress, StepProgress, SummaryProgress, decode
from services.tolaria.report import write_report
from services.tolaria.run_folder import RunFolder
from services.tolaria.verdict import CONFIDENCE, Difference, judge, shape, spent
from services.tolaria.view import LiveView, PlainView, QuietView, View

EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1
EXIT_USAGE: Final = 2
EXIT_NO_SERVICE: Final = 3
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


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
    #: Seconds from the command to the first sign that a step was made.
    first_step: float | None = None
    #: Seconds by part of the training process's own start.
    startup: dict[str, float] = field(default_factory=dict)


class Launcher:
    """One launch of one run. Use :func:`train`."""

    #: What is said when it is interrupted.
    STOPPING = "stopping: saving a checkpoint (again: stop now)"

    def __init__(self, folder: RunFolder, config: EsperConfig, options: Options, *, resume: bool) -> None:
        self._folder = folder
        self._config = config
        self._options = options
        self._resume = resume
        self._story = _Story()
        self._interrupted: signal.Signals | None = None
        self._began = psutil.Process().create_time()
        self._view: View = QuietView(options.stream)

    async def run(self) -> int:
        """Everything; returns the exit code."""
        # Made here: a supervisor belongs to the running loop.
        self._supervisor = self._make_supervisor()
        self._view = self._make_view()
        loop = asyncio.get_running_loop()
        for number in _SIGNALS:
            loop.add_signal_handler(number, self._stop, number)
        self._view.start()
        try:
            async with self._supervisor:
                status, code = self._outcome(await self._supervise())
        except EsperError as error:
            log = error.metadata.get("log")
            self._story.failure = f"{error.message}{f' (log: {log})' if log else ''}"
            status, code = "failed", EXIT_NO_SERVICE
        finally:
            self._view.stop()
        self._write_mesh()
        if self._options.services_only and code == EXIT_DONE:
            return EXIT_DONE
        self._finish(status, code)
        return code

    def _make_supervisor(self) -> Supervisor:
        return Supervisor(self._config, self._folder.path, on_event=self._hear_mesh)

    async def _supervise(self) -> int:
        """Exit code of the training process; of the services alone 0."""
        if self._options.services_only:
            await self._supervisor.start()
            if self._interrupted is None:
                self._tell_addresses()
            return await self._supervisor.wait()
        job = Job(
            name="training",
            command=self._command(resume=self._resume),
            restart=self._after_crash,
            on_progress=self._hear,
            threads=self._config.training.threads,
        )
        await self._supervisor.start(job)
        self._write_mesh()
        return await self._supervisor.wait()

    def _command(self, *, resume: bool) -> Sequence[str]:
        command = [sys.executable, "-m", "services.tolaria.training_process", "--run-dir", str(self._folder.path)]
        return [*command, "--resume"] if resume else command

    def _after_crash(self, code: int, restarts: int) -> Sequence[str] | None:
        """Resume a process that was killed; one that ended by itself has said why and would end so again."""
        if code >= 0:
            return None
        name = signal.Signals(-code).name
        if restarts >= self._config.training.max_restarts:
            self._story.failure = f"the training process was ended by {name}, and was resumed {restarts} times before"
            return None
        self._view.say(f"training process ended by {name}: resuming it from its last checkpoint")
        return self._command(resume=True)

    def _stop(self, number: signal.Signals) -> None:
        """Once: in good order, with a checkpoint. Twice: now."""
        again = self._interrupted is not None
        self._interrupted = self._interrupted or signal.Signals(number)
        self._supervisor.request_stop(now=again)
        if not self._options.services_only:
            self._view.say("stopping now" if again else self.STOPPING)

    # ---- listening -------------------------------------------------------------------------------------------------

    def _hear(self, message: Mapping[str, Any]) -> None:
        known = decode(json.dumps(message))
        if known is not None:  # a newer training process may say more
            self._note(known)
            self._view.hear(known)

    def _note(self, message: Progress) -> None:
        story = self._story
        if isinstance(message, SummaryProgress):
            story.summary = dict(message.summary)
        elif isinstance(message, StatusProgress):
            story.startup.update(message.detail.get("startup", {}))
            if message.state == "failed":
                story.failure = message.message
        elif isinstance(message, StepProgress | EpochProgress) and story.first_step is None:
            story.first_step = time.time() - self._began
            if self._options.output != "quiet":
                self._view.say(self._startup_line(story.first_step))
            self._write_mesh()

    def _hear_mesh(self, event: Event) -> None:
        self._view.mesh(event)
        if event.kind in ("restarting", "gave_up"):
            self._write_mesh()

    def _startup_line(self, first_step: float) -> str:
        """Where the time to the first step went."""
        ready = {s.name: s.serving_after for s in self._supervisor.services.values() if s.serving_after is not None}
        services = ", ".join(
            f"{name} {seconds:.1f}" for name, seconds in sorted(ready.items(), key=lambda item: item[1])
        )
        beside = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._story.startup.items())
        return (
            f"first step {first_step:.1f} s after the command: services {max(ready.values(), default=0.0):.1f} "
            f"({services}); at the same time the training process: {beside}"
        )

    # ---- telling ---------------------------------------------------------------------------------------------------

    def _make_view(self) -> View:
        stream = self._options.stream
        if self._options.output == "quiet":
            return QuietView(stream)
        if self._options.output == "verbose" or not stream.isatty() or self._options.services_only:
            return PlainView(stream, verbose=self._options.output == "verbose")
        return LiveView(stream, self._supervisor.services, run=self._folder.run_id)

    def _write_mesh(self) -> None:
        """What the report needs of the mesh: services with their restarts, what happened, where start-up time went."""
        content = {
            "services": {name: dataclasses.asdict(status) for name, status in self._supervisor.services.items()},
            "events": [dataclasses.asdict(event) for event in self._supervisor.events],
            "training_restarts": self._supervisor.job_restarts,
            "first_step_seconds": self._story.first_step,
            "startup": self._story.startup,
        }
        with contextlib.suppress(EsperError):  # a full disk costs a part of the report, never the run
            write_atomically(self._folder.path / "mesh.json", json.dumps(content, indent=1) + "\n", fsync=False)

    def _tell_addresses(self) -> None:
        if self._options.json:
            print_json({"run_dir": str(self._folder.path), "services": self._services()})
        for service in self._supervisor.services.values():
            self._view.say(f"{service.name:<9} grpcurl -plaintext {service.address} list")
        self._view.say("Ctrl-C ends them")

    def _finish(self, status: str, code: int) -> None:
        summary = self._summary(status)
        with contextlib.suppress(EsperError):  # it is printed all the same
            write_atomically(self._folder.path / "summary.json", json.dumps(summary, indent=1) + "\n")
        try:
            write_report(self._folder.path)
        except EsperError as error:
            summary["report"] = None
            self._view.say(f"no report: {error.message}")
        for line in result_lines(summary):
            self._view.say(line)
        if status == "interrupted":
            saved = "" if self._has_checkpoint() else " (there is no checkpoint yet: it begins anew)"
            self._view.say(f"interrupted; go on with: python train.py --resume {self._folder.path}{saved}")
        elif code == EXIT_NO_SERVICE:
            sys.stderr.write(f"train.py: {summary['reason']}\n")
        elif code == EXIT_FAILED:
            sys.stderr.write(f"train.py: training failed: {summary['reason']}\n")
        if self._options.json:
            print_json(summary)

    def _has_checkpoint(self) -> bool:
        return any(self._folder.path.glob("checkpoints/*/manifest.json"))

    def _outcome(self, code: int) -> tuple[str, int]:
        """Status and exit code, given the exit code of the training process."""
        if self._options.services_only:
            return "succeeded", EXIT_DONE
        if code == EXIT_DONE and self._story.summary is not None:
            return str(self._story.summary["status"]), EXIT_DONE
        if self._interrupted is not None:
            return "interrupted", 128 + self._interrupted
        self._story.failure = self._story.failure or (
            f"the training process ended without a word; see {self._folder.path / 'logs' / 'training.log'}"
        )
        return "failed", EXIT_FAILED

    def _services(self) -> dict[str, Any]:
        return {s.name: {"address": s.address, "restarts": s.restarts} for s in self._supervisor.services.values()}

    def _summary(self, status: str) -> dict[str, Any]:
        """The JSON object that scripts rely on; what was not measured is null."""
        unknown: dict[str, Any] = {
            "reason": self._story.failure,
            "epochs": None,
            "adaptations": {"started": None, "fossilized": None, "culled": None},
            "seeds": [],
            "parameters": {"host": None, "final": None},
            "flops": dict.fromkeys(FLOPS),
            "comparisons": {},
            "changes": [],
            "accuracy": {"grown": None, "host": None, "bigger": None, "uniform": None},
            "start_accuracy": None,
            "compare_at": self._config.compare_at,
            "arms": {},
            "growth_seconds": None,
            "rollbacks": None,
            "rewinds": None,
            "budget": dict.fromkeys(BUDGET),
            "kernel_cache": dict.fromkeys(CACHE),
            "export": None,
            "events": {"published": None, "dropped": None},
        }
        known = {
            **unknown,
            **(self._story.summary or {}),
            "run_id": self._folder.run_id,
            "run_dir": str(self._folder.path),
            "status": status,
            "startup_seconds": self._story.first_step,
            "services": self._services(),
            "training_restarts": self._supervisor.job_restarts,
            "report": str(self._folder.path / "report.html"),
        }
        return {**known, "verdict": dataclasses.asdict(judge(known))}


def print_json(content: Mapping[str, Any]) -> None:
    """The one line on standard output."""
    sys.stdout.write(json.dumps(content) + "\n")
    sys.stdout.flush()


def result_lines(summary: Mapping[str, Any]) -> list[str]:
    """The result as people read it: the verdict, its reasons, the arms, what growth cost."""
    lines: list[str] = []
    arms: Mapping[str, Mapping[str, Any]] = summary.get("arms") or {}
    if arms:
        found = judge(summary)
        lines += ["", f"{found.title}.", *(f"  {reason}" for reason in found.reasons)]
        if shape_words := shape(summary):
            lines.append(f"  The shape: {', '.join(shape_words)}.")
        lines += ["", *_arm_table(arms, summary.get("comparisons") or {}), "", *found.notes]
    if (start := summary.get("start_accuracy")) is not None:
        lines.append(f"before the first step the trained host stood at {start:.2f} % on the validation split")
    lines += _cost_lines(summary)
    adaptations = summary["adaptations"]
    if adaptations["started"] is not None:
        lines.append("seeds: {started} started, {fossilized} fossilized, {culled} culled".format_map(adaptations))
    if summary["report"] is not None:
        lines.append(f"report: {summary['report']}")
    return lines


def _arm_table(arms: Mapping[str, Mapping[str, Any]], comparisons: Mapping[str, Any]) -> list[str]:
    head = (
        "arm",
        f"test % [{CONFIDENCE:.0%}]",
        "grown is better by",
        "parameters",
        "FLOPs/image",
        "FLOPs spent",
        "seconds",
        "growth",
    )
    rows = [head, *(_arm_row(name, arm, comparisons.get(name)) for name, arm in arms.items())]
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if index else cell.ljust(width) for index, (cell, width) in enumerate(line)
        ).rstrip()
        for line in (list(zip(row, widths, strict=True)) for row in rows)
    ]


def _arm_row(name: str, arm: Mapping[str, Any], difference: Mapping[str, Any] | None) -> tuple[str, ...]:
    low, high = arm["test_interval"]
    return (
        name,
        f"{arm['test_accuracy']:.2f} [{low:.1f}, {high:.1f}]",
        str(Difference(**difference)) if difference is not None else "-",
        f"{arm['parameters']:,d}",
        f"{arm['flops']:,d}",
        f"{spent(arm):.3g}",
        f"{arm['seconds']:.1f}",
        "-" if arm["growth_seconds"] is None else f"{arm['growth_seconds']:.1f}",
    )


def _cost_lines(summary: Mapping[str, Any]) -> list[str]:
    flops, seconds = summary.get("flops") or {}, summary.get("growth_seconds")
    if not flops.get("total"):
        return []

    def share(name: str) -> str:
        return f"{flops[name] / flops['total']:.1%}"

    if seconds is None:  # growth was off: nothing is said of it
        told = f"training {share('training')} (steps taken back {share('discarded')})"
        return [f"{flops['total']:.3g} FLOPs: {told}, validation {share('validation')}"]
    culled, taken_back, measuring, judging = map(share, ("culled_seeds", "discarded", "health", "counterfactuals"))
    told = f"training {share('training')} (culled seeds {culled}, steps taken back {taken_back}), measuring {measuring}"
    return [
        f"{flops['total']:.3g} FLOPs: {told}, counterfactuals {judging}, validation {share('validation')}",
        f"growth took {seconds:.1f} s of the grown network's time: measuring, counterfactuals, surgery",
    ]


def _make_keys(config: EsperConfig, run_dir: Path) -> None:
    """The key pair that Tezzeret signs with. Raises EsperError (STORAGE_FULL, STORAGE_FAILED)."""
    folder = (config.run.state_dir or run_dir / "state") / "keys"
    try:
        generate_keypair(folder)
    except OSError as error:
        raise storage_error(folder, error) from error
    except SignatureError as error:
        raise EsperError(f"{folder}: {error}", reason=Reason.STORAGE_FAILED) from error


def train(folder: RunFolder, config: EsperConfig, options: Options, *, resume: bool) -> int:
    """Launch a run in its folder; returns the exit code.

    Raises EsperError (STORAGE_FULL, STORAGE_FAILED) where the signing keys cannot be made.
    """
    _make_keys(config, folder.path)
    return asyncio.run(Launcher(folder, config, options, resume=resume).run())


def check_services(config: EsperConfig, options: Options) -> int:
    """Start, or dial, every service until it is healthy; print how each is.

    Returns 0, or 3 when one cannot be started or reached. Raises EsperError as :func:`train` does.
    """
    with tempfile.TemporaryDirectory(prefix="esper-check-") as name:
        run_dir = Path(name)
        write_atomically(run_dir / "config.yaml", dump(config), fsync=False)
        _make_keys(config, run_dir)
        try:
            rows = asyncio.run(_check(config, run_dir))
        except EsperError as error:
            sys.stderr.write(f"train.py: {error.message}\n")
            return _checked("failed", error.message, {}, options)
    for service, row in rows.items():
        origin = "running elsewhere" if row["external"] else "started here"
        options.stream.write(
            f"{service:<9} SERVING  {row['address']:<22} after {row['ready_seconds']:.1f} s, {origin}\n"
        )
    return _checked("succeeded", "", rows, options)


def _checked(status: str, reason: str, rows: Mapping[str, Any], options: Options) -> int:
    if options.json:
        print_json({"status": status, "reason": reason, "services": rows})
    return EXIT_DONE if status == "succeeded" else EXIT_NO_SERVICE


async def _check(config: EsperConfig, run_dir: Path) -> dict[str, dict[str, Any]]:
    async with Supervisor(config, run_dir) as supervisor:
        await supervisor.start()  # it returns when grpc.health.v1 says SERVING of each
        return {
            name: {
                "address": status.address,
                "ready_seconds": status.serving_after,
                "external": status.state is State.EXTERNAL,
            }
            for name, status in supervisor.services.items()
        }


def dry_run(loaded: LoadedConfig, options: Options) -> int:
    """Print the effective configuration, where each value comes from, and the plan."""
    plan = plan_of(loaded.config)
    if options.json:
        effective = loaded.config.model_dump(mode="json")
        print_json({"config": effective, "provenance": dict(loaded.provenance), "plan": plan.splitlines()})
    else:
        sys.stdout.write(render_effective(loaded) + plan)
    return EXIT_DONE


def plan_of(config: EsperConfig) -> str:
    """What a run would do, in words."""
    growth, services = config.growth, config.services
    own = [name for name in NEEDS if getattr(services, name).address is None]
    lines = [
        f"plan: start {', '.join(own) or 'no service'} on {services.host}",
        f"      train {config.model.name} on {config.data.name} for {config.training.epochs} epochs",
    ]
    if growth.enabled:
        start, end = (round(share * config.training.epochs) for share in growth.window)
        lines.append(
            f"      grow by {growth.policy}: {growth.decisions} decisions between epochs {start} and {end}, "
            f"to at most {growth.budget}"
        )
    else:
        lines.append("      without growth")
    lines.append(f"      then compare with {', '.join(config.compare) or 'nothing'}, and read the test set once")
    return "\n".join(lines) + "\n"


def refuse_changes(loaded: LoadedConfig, run: EsperConfig) -> None:
    """A resumed run keeps its configuration: refuse command lines that ask for another.

    Where runs lie and what they are called may be said again: that is how one is found.

    Raises:
        EsperError: INVALID_FIELD, naming each key with both values.
    """
    kept, asked = ({dotted(path): value for path, value in leaves(config)} for config in (run, loaded.config))
    changed = [
        f"{key} is {inline(_plain(kept[key]))}, not {inline(_plain(value))}"
        for key, value in asked.items()
        if loaded.provenance[key] == "--set" and not key.startswith("run.") and value != kept[key]
    ]
    if changed:
        raise EsperError(
            f"a resumed run keeps its configuration ({'; '.join(changed)}); leave that away, or start a new run",
            reason=Reason.INVALID_FIELD,
        )


def _plain(value: Any) -> Any:
    """What YAML can spell."""
    return value if isinstance(value, bool | int | float | list | None) else str(value)
