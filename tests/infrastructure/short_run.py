"""One short run of the whole system that several tests look at: while it lives, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest

from esper.oona.v1 import event_pb2, event_service_pb2
from esper.oona.v1.event_service_pb2_grpc import EventServiceStub
from tests.infrastructure.runs import SERVICES, SHORT, Ended, Run, json_lines, running


@dataclass
class ShortRun:
    """A finished run, and what was seen of it while it lived."""

    folder: Path
    ended: Ended
    #: Processes whose memory maps hold torch.
    with_torch: frozenset[str]
    #: Listening TCP ports by process.
    listening: dict[str, list[int]]
    #: Events that a stranger heard on Oona, by topic.
    events: dict[str, list[event_pb2.Event]]
    #: Processes that were still there after the end.
    left_over: list[psutil.Process]
    addresses: dict[str, str] = field(default_factory=dict)

    def lines(self, name: str) -> list[dict[str, Any]]:
        """The JSON lines of a file of the run folder."""
        return json_lines(self.folder / name)

    def metrics(self, arm: str = "grown") -> list[dict[str, Any]]:
        """One object per epoch of ``arm``."""
        return [line for line in self.lines("metrics.jsonl") if line["arm"] == arm]


class Eavesdropper(threading.Thread):
    """Hears all events of a run on Oona until the service ends."""

    def __init__(self, run: Run) -> None:
        super().__init__(name="eavesdropper", daemon=True)
        self.events: dict[str, list[event_pb2.Event]] = {}
        self._address = run.address("oona")

    def run(self) -> None:
        """Listen."""
        request = event_service_pb2.TailRequest(last=1000)
        # The stream ends with the service: by itself when Oona drains, broken when it is cut off.
        with grpc.insecure_channel(self._address) as channel, contextlib.suppress(grpc.RpcError):
            for answer in EventServiceStub(channel).Tail(request, timeout=120.0):
                event = answer.stored_event.event
                self.events.setdefault(event.topic.removeprefix("topics/"), []).append(event)


def look_into(run: Run) -> tuple[frozenset[str], dict[str, list[int]]]:
    """Which processes of a live run have torch in memory, and who listens where."""
    processes = {name: run.process(name) for name in (*SERVICES, "training", "mesh")}
    with_torch = frozenset(
        name for name, process in processes.items() if "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
    )
    listening = {
        name: [c.laddr.port for c in process.net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
        for name, process in processes.items()
    }
    return with_torch, listening


@pytest.fixture(scope="session")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ShortRun]:
    """The one short run of this session, compared with its controls."""
    with running(tmp_path_factory.mktemp("short-run"), *SHORT, "compare=[host,bigger]") as run:
        eavesdropper = Eavesdropper(run)
        eavesdropper.start()
        addresses = json.loads((run.folder / "addresses.json").read_text())
        run.until_epoch(4)
        with_torch, listening = look_into(run)
        ended = run.wait()
        eavesdropper.join(10.0)
        yield ShortRun(run.folder, ended, with_torch, listening, eavesdropper.events, run.left_over(), addresses)


def lives(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The seeds of a summary without the ids of their decisions, which Tamiyo makes anew for each run."""
    return [{key: value for key, value in seed.items() if key != "decision"} for seed in summary["seeds"]]
