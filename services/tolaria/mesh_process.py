"""The process that talks to the services for a run: ``python -m services.tolaria.mesh_process --run-dir DIR ...``.

The training process starts it and tells it over a socket what to do (:mod:`services.tolaria.mesh_link` is that end).
Torch-free. It ends with the socket: nothing is left behind by a training process that was killed.
"""

from __future__ import annotations

import argparse
import contextlib
import contextvars
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, cast

from google.protobuf import descriptor_pool, message_factory
from google.protobuf.message import Message
from opentelemetry import context

# What is published and shown arrives by name: its messages are registered by these imports.
from esper.events.v1 import events_pb2  # noqa: F401 - registers its messages
from esper.kasmina.v1 import kasmina_service_pb2, seed_pb2, topology_pb2  # noqa: F401 - registers its messages
from esper.tamiyo.v1 import observation_pb2, outcome_pb2
from esper.tolaria.v1 import run_pb2  # noqa: F401 - registers its messages
from services.blueprints.signature import load_public_key
from services.chassis import logs, process, telemetry
from services.chassis.config.loader import load_config
from services.chassis.errors import EsperError
from services.tolaria import frames
from services.tolaria.kernel_files import KernelFiles
from services.tolaria.mesh import MeshClient
from services.tolaria.ports import (
    Command,
    CommandResult,
    Decision,
    EventCounts,
    KernelFile,
    KernelTarget,
    KernelUnavailableError,
    PendingKernel,
    Picture,
)

_LOG: Final = logging.getLogger(__name__)
#: Calls that wait for a service at the same time; there is one training thread to ask them.
_CALLS: Final = 4
#: How often the counts of events are told while nothing else happens, seconds.
_LOOK_SECONDS: Final = 0.5
_START_SECONDS: Final = 0.02


class _Shelf(KernelFiles):
    """Tells the training process of each kernel, so that it can have it at hand."""

    tell: Callable[[str], None]

    def admit(self, file: KernelFile) -> str:
        """See ``KernelFiles``."""
        digest = super().admit(file)
        self.tell(digest)
        return digest


class MeshProcess:
    """Does what comes down the socket with a ``MeshClient``, and sends up what that has to say.

    Frames down are ``{"do": name, "cause": traceparent or null, ...}``; those up are ``ready``, answers
    ``{"id": n, ...}``, ``arrived`` (commands wait; ``take`` fetches them), ``kernel`` (one was put into the run
    folder) and ``counts``.
    """

    def __init__(self, mesh: MeshClient, end: socket.socket) -> None:
        self._mesh = mesh
        self._socket = end
        self._sending = threading.Lock()
        self._calls = ThreadPoolExecutor(_CALLS)
        self._requests: dict[int, PendingKernel] = {}
        self._counts = EventCounts()
        self._taken = threading.Event()
        self._over = threading.Event()
        self._listener = threading.Thread(target=self._listen, name="commands", daemon=True)

    def serve(self) -> None:
        """Until the training process says that it is over, or is gone."""
        self._mesh.start()
        self._send({"ready": True})
        self._listener.start()
        with self._socket.makefile("rb") as stream:
            for header, body in frames.unpack(cast("Any", stream)):
                if header["do"] == "stop":
                    break
                with _caused_by(header["cause"]):
                    getattr(self, f"_{header['do']}")(header, body)
        self._over.set()
        self._taken.set()
        self._mesh.stop()
        self._tell_counts()
        self._calls.shutdown()
        self._listener.join()

    def tell_kernel(self, digest: str) -> None:
        """Say that a kernel is in the run folder."""
        self._send({"kernel": digest})

    def _send(self, header: Mapping[str, Any]) -> None:
        # A training process that is gone hears nothing; the end of the socket says so to serve().
        with self._sending, contextlib.suppress(OSError):
            self._socket.sendall(frames.pack(header))

    # ---- what is asked for, by the name in its frame -----------------------------------------------------------------

    def _answer_later(self, call: int, work: Callable[[], Mapping[str, Any]]) -> None:
        """Beside the reading thread; with the span that asked as parent."""
        current = contextvars.copy_context()
        self._calls.submit(lambda: self._send({"id": call, **current.run(work)}))

    def _candidates(self, header: Mapping[str, Any], _: bytes) -> None:
        def work() -> dict[str, Any]:
            return {"blueprints": [blueprint.to_json() for blueprint in self._mesh.candidates()]}

        self._answer_later(header["id"], work)

    def _decide(self, header: Mapping[str, Any], body: bytes) -> None:
        def work() -> dict[str, Any]:
            observation = observation_pb2.Observation.FromString(body)
            answer = self._mesh.decide(
                observation, policy=header["policy"], request_id=header["request_id"], deadline=header["deadline"]
            )
            return {"decision": asdict(answer)} if isinstance(answer, Decision) else {"none": answer.reason}

        self._answer_later(header["id"], work)

    def _obtain(self, header: Mapping[str, Any], _: bytes) -> None:
        call = header["id"]
        self._requests[call] = request = self._mesh.obtain_kernel(KernelTarget.from_json(header["target"]))

        def tell() -> None:
            self._requests.pop(call, None)
            try:
                self._send({"id": call, "digest": request.result()})
            except KernelUnavailableError as error:
                self._send({"id": call, "error": str(error)})

        request.future.add_done_callback(lambda _: tell())

    def _cancel(self, header: Mapping[str, Any], _: bytes) -> None:
        if request := self._requests.get(header["id"]):
            request.cancel()

    def _report(self, header: Mapping[str, Any], body: bytes) -> None:
        self._mesh.report_outcome(outcome_pb2.Outcome.FromString(body), header["kernel"])

    def _publish(self, header: Mapping[str, Any], body: bytes) -> None:
        self._mesh.publish(header["topic"], header["key"], _message(header["type"], body))

    def _show(self, header: Mapping[str, Any], body: bytes) -> None:
        self._mesh.show(cast("Picture", _message(header["type"], body)))

    def _answer(self, header: Mapping[str, Any], _: bytes) -> None:
        result = header["result"]
        self._mesh.answer(CommandResult(**{**result, "command": Command.from_json(result["command"])}))

    def _take(self, _: Mapping[str, Any], __: bytes) -> None:
        self._send({"commands": [asdict(command) for command in self._mesh.commands()]})
        self._taken.set()

    def _count(self, header: Mapping[str, Any], _: bytes) -> None:
        self._tell_counts()
        self._send({"id": header["id"]})

    # ---- what comes up -----------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        """Say when commands wait. They stay here until they are taken: so long their callers can withdraw them."""
        while not self._over.is_set():
            self._mesh.wait(_LOOK_SECONDS)
            if self._mesh.waiting:
                self._taken.clear()
                self._send({"arrived": True})
                self._taken.wait()
            self._tell_counts()

    def _tell_counts(self) -> None:
        counts = self._mesh.event_counts()
        if counts != self._counts:
            self._counts = counts
            self._send({"counts": asdict(counts)})


def _services_are_there(run_dir: Path, end: socket.socket) -> bool:
    """Wait until the supervisor has written where they are; False if the training process ends before."""
    while not (run_dir / "addresses.json").exists():
        with contextlib.suppress(BlockingIOError):
            if not end.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT):
                return False
        time.sleep(_START_SECONDS)
    return True


def _message(name: str, body: bytes) -> Message:
    kind = descriptor_pool.Default().FindMessageTypeByName(name)
    return message_factory.GetMessageClass(kind).FromString(body)


@contextlib.contextmanager
def _caused_by(traceparent: str | None) -> Iterator[None]:
    token = context.attach(telemetry.context_from(traceparent))
    try:
        yield
    finally:
        context.detach(token)


def main(argv: Sequence[str] | None = None) -> int:
    """Serve one training process. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m services.tolaria.mesh_process")
    parser.add_argument("--run-dir", type=Path, required=True, help="the run folder, with config.yaml")
    parser.add_argument("--run", required=True, help="id of the run")
    parser.add_argument("--incarnation", type=int, required=True)
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the socket to the training process")
    arguments = parser.parse_args(argv)
    # Both are the training process's to hear: it has things to say yet when it ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    run_dir: Path = arguments.run_dir
    config = load_config(run_dir / "config.yaml", environ={}).config
    logs.setup("training", config.telemetry.log_level)
    with socket.socket(fileno=arguments.socket) as end:
        if not _services_are_there(run_dir, end):
            return 0
        # Not before: until then the supervisor may move us. And before there are threads, which come with us.
        process.step_aside()
        tracer = telemetry.setup("training", config.telemetry, run_dir, arguments.run)
        shelf = _Shelf(run_dir / "kernels", load_public_key((config.run.state_dir or run_dir / "state") / "keys"))
        mesh = MeshClient(
            config=config,
            run=arguments.run,
            run_dir=run_dir,
            shelf=shelf,
            telemetry=tracer,
            incarnation=arguments.incarnation,
        )
        served = MeshProcess(mesh, end)
        shelf.tell = served.tell_kernel
        try:
            served.serve()
        except EsperError as error:
            _LOG.error("the services cannot be talked to: %s", error.message)
            return 1
        finally:
            tracer.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main())
