"""The run's journal: everything from outside that changes its course, written before it is applied.

Decisions of Tamiyo, kernels that arrived, commands of callers: each is one JSON line with the clock at which it was
applied. A resumed run starts at a checkpoint, which knows how many entries lie behind it, and meets the rest again at
the same clocks; so it becomes the run it was, whatever the mesh would answer today.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.tolaria.errors import JournalError
from services.tolaria.progress import finite


@dataclass(frozen=True, slots=True, order=True)
class Clock:
    """Where a run is: steps rise, and rollbacks and rewinds take them back, so the count of both comes first."""

    rollbacks: int
    step: int


@dataclass(frozen=True, slots=True)
class Entry:
    """One input of the run: ``kind`` and ``content`` say what, ``clock`` when."""

    kind: str
    clock: Clock
    content: dict[str, Any]


class Journal:
    """Appends with fsync; reads once, when opened. A last line cut short by a crash never was applied and is dropped.

    Raises JournalError for a file that is damaged before its last line or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        try:
            self._entries = [_parse(line) for line in whole.splitlines()]
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(f"{path} is damaged: {error}") from error
        self._file = path.open("ab")
        self._file.truncate(len(whole))
        #: How many entries lie behind the run; those after it are met again.
        self.position = len(self._entries)

    def append(self, kind: str, clock: Clock, content: dict[str, Any]) -> Entry:
        """Write an entry through to the disk; only then may it be applied."""
        entry = Entry(kind, clock, json.loads(json.dumps(finite(content))))
        line = {"kind": kind, "rollbacks": clock.rollbacks, "step": clock.step, "content": entry.content}
        try:
            self._file.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise JournalError(f"{self._path} cannot be written: {error.strerror}") from error
        self._entries.append(entry)
        self.position += 1
        return entry

    @property
    def replaying(self) -> bool:
        """Whether entries lie ahead: until they are met nothing new is asked for."""
        return self.position < len(self._entries)

    def next_at(self, clock: Clock, *kinds: str) -> Entry | None:
        """Take the next entry if it was applied at ``clock`` and is of one of ``kinds``; None if it lies further ahead.

        Raises JournalError for one that the run has passed: it is not the run that wrote this journal.
        """
        if not self.replaying:
            return None
        entry = self._entries[self.position]
        if entry.clock < clock:
            raise JournalError(
                f"{self._path}: entry {self.position} ({entry.kind} at step {entry.clock.step}) was passed at step "
                f"{clock.step}: this journal belongs to another run"
            )
        if entry.clock != clock or entry.kind not in kinds:
            return None
        self.position += 1
        return entry

    def first(self, kind: str) -> Entry | None:
        """The first entry of ``kind``, wherever the run is; None if there is none."""
        return next((entry for entry in self._entries if entry.kind == kind), None)

    def knows(self, kind: str, command_id: str) -> bool:
        """Whether that command of a caller was journaled as ``kind`` before: a gateway may pass one on again."""
        return any(
            entry.kind == kind and entry.content["command"]["command_id"] == command_id for entry in self._entries
        )

    def close(self) -> None:
        """Close the file. Idempotent."""
        self._file.close()


def _parse(line: bytes) -> Entry:
    content = json.loads(line)
    return Entry(content["kind"], Clock(content["rollbacks"], content["step"]), content["content"])
