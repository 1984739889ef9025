"""The process that trains: ``python -m services.tolaria.training_process --run-dir DIR [--resume | --diagnose]``.

It is no server: it hosts Tolaria's trainer and Kasmina's engine in the main thread; the clients of all services are in
a process of its own, which it starts (:mod:`services.tolaria.mesh_process`). The launcher starts it with the services,
so that torch is imported while they come up. Exit codes: 0 the run ended as planned (or was stopped by a caller), 1 it
failed for a reason that is told, 130 and 143 interrupted by SIGINT and SIGTERM with a checkpoint saved.
"""

from __future__ import annotations

import argparse
import gc
import logging
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Final

from services.blueprints.signature import load_public_key
from services.chassis import logs, process, telemetry
from services.chassis.config.loader import load_config
from services.chassis.config.schema import EsperConfig
from services.chassis.errors import EsperError
from services.kasmina.kernel_cache import KernelCache
from services.tolaria.interrupt import Interrupt, TrainingInterruptedError
from services.tolaria.kernel_shelf import KernelShelf
from services.tolaria.mesh_link import MeshLink
from services.tolaria.progress import ProgressWriter, StatusProgress, SummaryProgress

_LOG: Final = logging.getLogger(__name__)
#: From the launcher's death to our own at the latest: a checkpoint is written meanwhile, seconds.
_GRACE_SECONDS: Final = 20.0
_LOOK_SECONDS: Final = 0.02
#: How much longer than the launcher we wait for the services: it is the launcher that says which one is missing.
_MARGIN_SECONDS: Final = 10.0
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)
EXIT_DONE: Final = 0
EXIT_FAILED: Final = 1


def main(argv: Sequence[str] | None = None) -> int:
    """Train one run. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m services.tolaria.training_process")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run folder, with config.yaml")
    task = parser.add_mutually_exclusive_group()
    task.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    task.add_argument(
        "--diagnose", action="store_true", help="train a little, without services, and look at the layers"
    )
    arguments = parser.parse_args(argv)
    run_dir: Path = arguments.run_dir
    process.bind_to_parent(grace=_GRACE_SECONDS)
    progress = ProgressWriter(process.Progress())
    received: list[int] = []
    interrupt = Interrupt()

    def stop(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        interrupt.request(f"interrupted by {signal.Signals(number).name}")

    for number in _SIGNALS:
        signal.signal(number, stop)
    try:
        config = load_config(run_dir / "config.yaml", environ={}).config
        logs.setup("training", config.telemetry.log_level)
        if arguments.diagnose:
            summary = _diagnose(config, run_dir, progress, interrupt)
        else:
            summary = _train(config, run_dir, progress, interrupt, resume=arguments.resume)
    except TrainingInterruptedError as interruption:
        progress.write(StatusProgress(state="interrupted", message=str(interruption)))
        return 128 + received[0]
    except EsperError as error:
        _LOG.error("the run failed: %s", error.message)
        progress.write(StatusProgress(state="failed", message=error.message, detail={"reason": str(error.reason)}))
        return EXIT_FAILED
    except Exception as error:  # noqa: BLE001 - logged in full, and the launcher must hear of it
        # A bug, ours or of a user's network: the log has the traceback, people get the one line.
        _LOG.exception("the run failed")
        progress.write(StatusProgress(state="failed", message=f"{type(error).__name__}: {error}"))
        return EXIT_FAILED
    progress.write(SummaryProgress(summary=summary))
    return EXIT_DONE


def _train(
    config: EsperConfig, run_dir: Path, progress: ProgressWriter, interrupt: Interrupt, *, resume: bool
) -> dict[str, object]:
    began = time.perf_counter()
    progress.write(StatusProgress(state="starting", message="loading torch and the data"))
    mesh = MeshLink(
        config=config,
        run=run_dir.name,
        run_dir=run_dir,
        shelf=KernelShelf(
            run_dir / "kernels",
            KernelCache(config.growth.kernel_cache_bytes),
            load_public_key((config.run.state_dir or run_dir / "state") / "keys"),
        ),
        incarnation=time.time_ns() // 1_000_000,
    )
    # Its process loads while we load torch.
    mesh.start()
    tracer = telemetry.setup("training", config.telemetry, run_dir, run_dir.name)
    try:
        # Not before the first message: this takes seconds.
        from services.tolaria.session import Session

        loaded = time.perf_counter()
        session = Session(
            config, run_dir, progress=progress, interrupt=interrupt, telemetry=tracer, mesh=mesh, resume=resume
        )
        prepared = time.perf_counter()
        wait_for_services(run_dir, config.services.startup_timeout_seconds + _MARGIN_SECONDS, interrupt)
        startup = {"torch": loaded - began, "data": prepared - loaded, "waited": time.perf_counter() - prepared}
        progress.write(StatusProgress(state="ready", message="the services are there", detail={"startup": startup}))
        # What is loaded by now stays. A full garbage collection would look through all of it again, for 0.2 s and in
        # the middle of a step.
        gc.freeze()
        return session.run()
    finally:
        mesh.stop()
        tracer.shutdown()


def _diagnose(config: EsperConfig, run_dir: Path, progress: ProgressWriter, interrupt: Interrupt) -> dict[str, object]:
    progress.write(StatusProgress(state="starting", message="loading torch and the data"))
    # Not before the first message: this takes seconds.
    from services.tolaria.diagnosis_session import diagnose

    tracer = telemetry.setup("training", config.telemetry, run_dir, run_dir.name)
    try:
        return diagnose(config, run_dir, progress=progress, interrupt=interrupt, telemetry=tracer)
    finally:
        tracer.shutdown()


def wait_for_services(run_dir: Path, timeout: float, interrupt: Interrupt) -> None:
    """Return once the supervisor has written where all services are.

    Raises TrainingInterruptedError, or EsperError (SERVICE_UNREACHABLE) after ``timeout`` seconds.
    """
    from services.chassis.errors import Reason

    addresses, deadline = run_dir / "addresses.json", time.monotonic() + timeout
    while not addresses.exists():
        if interrupt.reason is not None:
            raise TrainingInterruptedError(interrupt.reason)
        if time.monotonic() > deadline:
            raise EsperError(f"the services were not there after {timeout:g} s", reason=Reason.SERVICE_UNREACHABLE)
        time.sleep(_LOOK_SECONDS)


if __name__ == "__main__":
    sys.exit(main())
