"""The services as the training thread sees them: at the other end of a socket, in a process that may die.

Python code beside the training thread takes turns with it, so nothing that talks to the services runs here: calls are
written to the socket without waiting, and one thread reads what comes back. It only keeps the bytes: what they say is
heard by the training thread between two steps, or by the reading thread while the training thread waits for it anyway.
(A third of a millisecond of Python beside a step, for a kernel that has come, was seen in the tail of the step times.)
The process at the other end is started again when it dies; what it was asked and had not answered is asked again, and
the newest picture of everything shown again. Torch-free but for the shelf; no gRPC.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import itertools
import logging
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from google.protobuf.message import Message

from esper.kasmina.v1 import seed_pb2
from esper.tamiyo.v1 import observation_pb2, outcome_pb2
from services.blueprints.spec import Blueprint
from services.chassis.config.schema import EsperConfig
from services.chassis.telemetry import current_traceparent
from services.tolaria import frames
from services.tolaria.kernel_shelf import KernelShelf
from services.tolaria.ports import (
    Command,
    CommandResult,
    Decision,
    EventCounts,
    KernelRequest,
    KernelTarget,
    KernelUnavailableError,
    NoDecision,
    PendingKernel,
    Picture,
)

_LOG: Final = logging.getLogger(__name__)
#: How much longer than its deadline the training thread waits for the other process to say that it is over, seconds.
_GRACE_SECONDS: Final = 0.5
_COUNT_SECONDS: Final = 1.0
#: The other process says what is still to be said for at most five.
_STOP_SECONDS: Final = 8.0
_FLUSH_SECONDS: Final = 0.005
_BACKOFF_SECONDS: Final = (0.1, 5.0)
_REMEMBERED_COMMANDS: Final = 4096
_SOCKET_BYTES: Final = 1 << 20
_READ_BYTES: Final = 1 << 16
#: Reads that wait to be heard; beyond, as in a long validation, the reading thread hears them itself.
_MOST_UNHEARD: Final = 64


class _Kernel(PendingKernel):
    """A kernel that the other process was asked for."""

    def __init__(self, request: Mapping[str, Any], link: MeshLink) -> None:
        super().__init__(concurrent.futures.Future())
        self.request: Final = request
        self._link = link

    @property
    def done(self) -> bool:
        self._link.hear()
        return super().done

    def result(self, timeout: float | None = None) -> str:
        with self._link.awaited():
            return super().result(timeout)

    def cancel(self) -> None:
        super().cancel()
        self._link.forget(self.request["id"])


class MeshLink:
    """The mesh of one run (``ports.Mesh``), in a process of its own.

    Args:
        config: The whole configuration; the other process reads the same one from the run folder.
        run: Id of the run.
        run_dir: The run folder, where the addresses of the services are.
        shelf: Where kernels are at hand.
        incarnation: Rises with every start of the run's training process.
    """

    def __init__(self, *, config: EsperConfig, run: str, run_dir: Path, shelf: KernelShelf, incarnation: int) -> None:
        self._config = config
        self.shelf: Final = shelf
        self._command: Final = [
            *(sys.executable, "-m", "services.tolaria.mesh_process", "--run-dir", str(run_dir)),
            *("--run", run, "--incarnation", str(incarnation), "--socket"),
        ]
        self._thread = threading.Thread(target=self._listen, name="mesh", daemon=True)
        self._numbers = itertools.count(1)
        self._stopping = threading.Event()
        self._ready = threading.Event()
        self._arrived = threading.Event()
        self._known: Sequence[Blueprint] = ()
        #: What was read and not heard yet; the last may end within a frame, which waits in ``_cut``.
        self._unheard: deque[bytes] = deque()
        self._cut = bytearray()
        self._hearing = threading.Lock()
        #: How many threads wait for what the other process says.
        self._awaiting = 0
        # Under the lock.
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        #: Frames that are not sent yet, and whether they are events; of the first one ``_sent`` bytes are.
        self._backlog: deque[tuple[bytes, bool]] = deque()
        self._sent = 0
        self._calls: dict[int, concurrent.futures.Future[Mapping[str, Any]]] = {}
        self._kernels: dict[int, _Kernel] = {}
        self._pictures: dict[str, bytes] = {}
        self._results: OrderedDict[str, CommandResult | None] = OrderedDict()
        self._waiting: deque[Command] = deque()
        self._more_commands = False
        #: Events that were sent to the process that lives now, and what it said became of them.
        self._events = 0
        self._counts = EventCounts()
        #: Of processes that died; what they had not told of counts as dropped, as does what found the backlog full.
        self._earlier = EventCounts()

    # ---- life ------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the other process, which waits for the services; returns at once."""
        self._thread.start()

    def until_ready(self, timeout: float) -> bool:
        """Wait until it has begun, at most ``timeout`` seconds; without it a first decision might come too late."""
        return self._ready.wait(timeout)

    def stop(self) -> None:
        """Let it say what is still to be said, for at most a few seconds, and end it."""
        self._stopping.set()
        with self._lock:
            self._awaiting += 1  # to the end: no more steps are made
        self.hear()
        self._send({"do": "stop", "cause": None})
        # One that still waits for the services has nothing to say.
        ends = time.monotonic() + (_STOP_SECONDS if self._ready.is_set() else 0.0)
        while self._thread.is_alive() and time.monotonic() < ends:
            self._flush()
            self._thread.join(_FLUSH_SECONDS)
        with self._lock:
            running = self._process
        if running is not None:
            running.kill()  # it has ended, but for a service that hangs
        self._thread.join()
        self._lose("the run is over")

    def _listen(self) -> None:
        """Keep the other process running and hear it."""
        least, most = _BACKOFF_SECONDS
        pause = least
        while True:
            began = time.monotonic()
            self._serve()
            if self._stopping.is_set():
                return
            self._lose("the process that talks to the services died")
            pause = least if time.monotonic() - began > most else min(most, 2 * pause)
            _LOG.warning("the process that talks to the services died: started again in %.1f s", pause)
            self._stopping.wait(pause)

    def _serve(self) -> None:
        """One life of the other process."""
        ours, theirs = socket.socketpair()
        with ours:
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BYTES)
            with theirs:
                command = [*self._command, str(theirs.fileno())]
                started = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
            with self._lock:
                self._process, self._socket, self._sent = started, ours, 0
                # In the order in which they came to be: commands may be waiting for what a picture tells.
                again = [*self._pictures.values(), *(frames.pack(kernel.request) for kernel in self._kernels.values())]
                queued = {id(frame) for frame in again}
                rest = [waiting for waiting in self._backlog if id(waiting[0]) not in queued]
                self._backlog = deque([*((frame, False) for frame in again), *rest])
            self._flush()
            self._read(ours)
            with self._lock:
                self._socket = None
            started.wait()

    def _read(self, end: socket.socket) -> None:
        """Keep what the other process says, until it is gone.

        On the cores of the training thread, not aside: whoever is sent to sleep with the interpreter's lock by a busy
        service makes training wait for its next turn.
        """
        # Reset: it was killed with something unread.
        with contextlib.suppress(ConnectionResetError):
            while read := end.recv(_READ_BYTES):
                self._ready.set()  # the first that it says is that it has begun
                self._unheard.append(read)
                if self._awaiting or len(self._unheard) > _MOST_UNHEARD:
                    self.hear()
        self.hear()
        with self._hearing:
            self._cut.clear()

    def _lose(self, why: str) -> None:
        """Nobody will answer what was asked, but for kernels: those are asked for again."""
        with self._lock:
            calls = list(self._calls.values())
            self._calls.clear()
            kernels = list(self._kernels.values()) if self._stopping.is_set() else []
            self._more_commands = False
            untold = self._events - self._counts.published - self._counts.dropped
            self._earlier = EventCounts(
                self._earlier.published + self._counts.published,
                self._earlier.dropped + self._counts.dropped + untold,
            )
            self._events, self._counts = 0, EventCounts()
        for call in calls:
            call.set_result({"none": why})
        for kernel in kernels:
            kernel.future.cancel()

    # ---- the socket ------------------------------------------------------------------------------------------------

    def _send(self, header: Mapping[str, Any], body: bytes = b"", *, event: bool = False) -> None:
        """Never waits: what does not go now goes with a later call."""
        frame = frames.pack(header, body)
        with self._lock:
            self._backlog.append((frame, event))
        self._flush()

    def _flush(self) -> None:
        # Full, or gone, which the listening thread sees to.
        with self._lock, contextlib.suppress(OSError):
            while self._backlog and self._socket is not None:
                frame, event = self._backlog[0]
                self._sent += self._socket.send(memoryview(frame)[self._sent :], socket.MSG_DONTWAIT)
                if self._sent == len(frame):
                    self._backlog.popleft()
                    self._sent = 0
                    self._events += event

    def hear(self) -> None:
        """Take in what was read. Cheap when there is nothing: asked at every step."""
        if not self._unheard:
            return
        with self._hearing:
            while self._unheard:
                self._cut += self._unheard.popleft()
            for header in frames.split(self._cut):
                self._hear(header)

    @contextlib.contextmanager
    def awaited(self) -> Iterator[None]:
        """Inside, the reading thread hears what it reads: whoever computes is waiting for it."""
        with self._lock:
            self._awaiting += 1
        try:
            # What came before it was counted.
            self.hear()
            yield
        finally:
            with self._lock:
                self._awaiting -= 1

    def _hear(self, header: Mapping[str, Any]) -> None:
        if "id" in header:
            self._answered(header["id"], header)
        elif "ready" in header:
            pass  # the reading thread has said so
        elif "arrived" in header:
            with self._lock:
                self._more_commands = True
            self._arrived.set()
        elif "commands" in header:
            for content in header["commands"]:
                self._take(Command.from_json(content))
        elif "kernel" in header:
            with contextlib.suppress(KernelUnavailableError):  # whoever takes it hears it
                self.shelf.fetch(header["kernel"])
        else:
            with self._lock:
                self._counts = EventCounts(**header["counts"])

    def _answered(self, number: int, header: Mapping[str, Any]) -> None:
        with self._lock:
            call, kernel = self._calls.pop(number, None), self._kernels.pop(number, None)
        if call is not None:
            call.set_result(header)
        if kernel is None:
            return
        problem = header.get("error")
        if problem is None:
            try:
                self.shelf.fetch(header["digest"])
            except KernelUnavailableError as error:
                problem = str(error)
        with contextlib.suppress(concurrent.futures.InvalidStateError):  # cancelled this moment
            if problem is None:
                kernel.future.set_result(header["digest"])
            else:
                kernel.future.set_exception(KernelUnavailableError(problem))

    # ---- asking ----------------------------------------------------------------------------------------------------

    def _ask(self, header: Mapping[str, Any], body: bytes, timeout: float) -> Mapping[str, Any] | None:
        """The answer, or None after ``timeout`` seconds."""
        number = next(self._numbers)
        call: concurrent.futures.Future[Mapping[str, Any]] = concurrent.futures.Future()
        with self._lock:
            self._calls[number] = call
        self._send({**header, "id": number, "cause": current_traceparent()}, body)
        try:
            with self.awaited():
                return call.result(timeout)
        except concurrent.futures.TimeoutError:
            return None
        finally:
            with self._lock:
                self._calls.pop(number, None)

    def candidates(self) -> Sequence[Blueprint]:
        """Blueprints as Urza has them now, or as it had them last if it does not answer in time."""
        deadline = self._config.growth.decision_deadline_seconds
        answer = self._ask({"do": "candidates"}, b"", deadline + _GRACE_SECONDS)
        if answer is not None and "blueprints" in answer:
            self._known = tuple(Blueprint.from_json(content) for content in answer["blueprints"])
        return self._known

    def decide(
        self, observation: observation_pb2.Observation, *, policy: str, request_id: str, deadline: float
    ) -> Decision | NoDecision:
        """Ask Tamiyo; see ``ports.Mesh``."""
        started = time.perf_counter()
        wanted = {"do": "decide", "policy": policy, "request_id": request_id, "deadline": deadline}
        answer = self._ask(wanted, observation.SerializeToString(), deadline + _GRACE_SECONDS)
        took = 1e3 * (time.perf_counter() - started)
        if answer is None:
            return NoDecision(f"Tamiyo did not answer within {deadline:g} s", took)
        if "none" in answer:
            return NoDecision(answer["none"], took)
        return Decision.from_json({**answer["decision"], "latency_ms": took})

    def obtain_kernel(self, target: KernelTarget) -> KernelRequest:
        """Go after a kernel; see ``ports.Mesh``."""
        number = next(self._numbers)
        request = {"do": "obtain", "id": number, "target": target.to_json(), "cause": current_traceparent()}
        kernel = _Kernel(request, self)
        with self._lock:
            self._kernels[number] = kernel
        self._send(request)
        return kernel

    def forget(self, number: int) -> None:
        """A kernel that was asked for is not needed any more."""
        with self._lock:
            known = self._kernels.pop(number, None)
        if known is not None:
            self._send({"do": "cancel", "id": number, "cause": None})

    # ---- telling ---------------------------------------------------------------------------------------------------

    def report_outcome(self, outcome: outcome_pb2.Outcome, kernel: str) -> None:
        """Tell Tamiyo, and Urza about the ``kernel`` (empty: there was none)."""
        header = {"do": "report", "kernel": kernel, "cause": current_traceparent()}
        self._send(header, outcome.SerializeToString())

    def publish(self, topic: str, key: str, payload: Message) -> None:
        """Pass one event on; dropped and counted when more than a queue of them waits."""
        with self._lock:
            if len(self._backlog) >= self._config.telemetry.event_queue_size:
                self._earlier = EventCounts(self._earlier.published, self._earlier.dropped + 1)
                return
        header = {"do": "publish", "topic": topic, "key": key, "type": payload.DESCRIPTOR.full_name}
        self._send({**header, "cause": current_traceparent()}, payload.SerializeToString(), event=True)

    def event_counts(self) -> EventCounts:
        """What became of the events so far."""
        self._ask({"do": "count"}, b"", _COUNT_SECONDS)
        with self._lock:
            return EventCounts(
                self._earlier.published + self._counts.published, self._earlier.dropped + self._counts.dropped
            )

    def show(self, picture: Picture) -> None:
        """Let the gateways know; see ``ports.Mesh``."""
        kind = picture.DESCRIPTOR.full_name
        header = {"do": "show", "type": kind, "cause": None}
        frame = frames.pack(header, picture.SerializeToString())
        # A run has many seeds and one of everything else.
        name = picture.name if isinstance(picture, seed_pb2.Seed) else kind
        with self._lock:
            old = self._pictures.get(name)
            self._pictures[name] = frame
            # In place of an older one that still waits: a process that hangs makes no heap of pictures.
            for place, (queued, _) in enumerate(self._backlog):
                if queued is old and (place or not self._sent):
                    self._backlog[place] = (frame, False)
                    break
            else:
                self._backlog.append((frame, False))
        self._flush()

    # ---- obeying ---------------------------------------------------------------------------------------------------

    def commands(self) -> Sequence[Command]:
        """Commands that were fetched since the last call; fetches those that wait. Cheap when there are none."""
        if self._backlog:
            self._flush()
        self.hear()
        if not self._arrived.is_set():
            return ()
        with self._lock:
            found, more = tuple(self._waiting), self._more_commands
            self._waiting.clear()
            self._more_commands = False
            self._arrived.clear()
        if more:
            self._send({"do": "take", "cause": None})
        return found

    def wait(self, timeout: float) -> None:
        """Sleep until a command may have arrived."""
        self._flush()
        with self.awaited():
            self._arrived.wait(timeout)

    def answer(self, result: CommandResult) -> None:
        """Tell the gateway, now and whenever it asks again."""
        with self._lock:
            self._remember(result.command.command_id, result)
        self._send({"do": "answer", "result": asdict(result), "cause": None})

    def _take(self, command: Command) -> None:
        """A command, perhaps again after the other process died: what was answered is answered again."""
        with self._lock:
            known = command.command_id in self._results
            result = self._results.get(command.command_id)
            if not known:
                self._remember(command.command_id, None)
                self._waiting.append(command)
                self._arrived.set()
        if result is not None:
            self.answer(result)

    def _remember(self, command_id: str, result: CommandResult | None) -> None:
        self._results[command_id] = result
        while len(self._results) > _REMEMBERED_COMMANDS:
            self._results.popitem(last=False)
