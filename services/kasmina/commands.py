"""Commands that wait for a safe point: bounded, idempotent by their id, safe to use from any thread."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from services.kasmina.errors import CommandConflictError, QueueFullError


class CommandState(StrEnum):
    """Where a command stands; spelled as ``AdaptationState`` of the contract."""

    QUEUED = "QUEUED"
    APPLIED = "APPLIED"
    REFUSED = "REFUSED"
    CANCELLED = "CANCELLED"


@dataclass(frozen=True, slots=True)
class Command:
    """What a caller asks for.

    Attributes:
        command_id: Chosen by the caller; the same id twice is one command.
        action: ``germinate`` or ``cull``, or what else the loop knows.
        arguments: Of the action.
        requester: Who asks.
    """

    command_id: str
    action: str
    arguments: Mapping[str, str | int] = field(default_factory=dict)
    requester: str = ""


@dataclass(frozen=True, slots=True)
class Receipt:
    """A command and where it stands.

    Attributes:
        command: The command.
        state: Where it stands.
        handed_out: Whether the loop has it already; then it can no longer be cancelled.
        seed: Seed it made, once applied.
        step: Optimizer step at which it was applied or refused.
        error: Why it was refused; empty otherwise.
    """

    command: Command
    state: CommandState = CommandState.QUEUED
    handed_out: bool = False
    seed: str = ""
    step: int | None = None
    error: str = ""


class CommandQueue:
    """Commands in the order they came.

    Args:
        limit: Most commands waiting; one more is refused.
        remembered: Settled commands kept, so that a late repeat of their id is recognized.
    """

    def __init__(self, limit: int, remembered: int = 1024) -> None:
        self._limit = limit
        self._remembered = remembered
        self._lock = threading.Lock()
        self._receipts: OrderedDict[str, Receipt] = OrderedDict()
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._refused_full = 0

    def submit(self, command: Command) -> Receipt:
        """Queue a command; the same one again gives the receipt of the first.

        Raises:
            CommandConflictError: Its id was used for something else.
            QueueFullError: As many as allowed wait.
        """
        with self._lock:
            known = self._receipts.get(command.command_id)
            if known is not None:
                if known.command != command:
                    raise CommandConflictError(f"command {command.command_id!r} was used for something else")
                return known
            if len(self._waiting) >= self._limit:
                self._refused_full += 1
                raise QueueFullError(f"{self._limit} commands wait for a safe point already")
            receipt = Receipt(command)
            self._receipts[command.command_id] = receipt
            self._waiting[command.command_id] = None
            return receipt

    def drain(self) -> list[Command]:
        """Hand out what waits, oldest first, each command once."""
        with self._lock:
            handed = list(self._waiting)
            self._waiting.clear()
            for command_id in handed:
                self._receipts[command_id] = replace(self._receipts[command_id], handed_out=True)
            return [self._receipts[command_id].command for command_id in handed]

    def complete(self, command_id: str, *, step: int, seed: str = "", error: str = "") -> Receipt:
        """Note what became of a command: refused with an error, applied without.

        Raises:
            KeyError: There is no such command.
        """
        with self._lock:
            state = CommandState.REFUSED if error else CommandState.APPLIED
            return self._settle(command_id, state, step=step, seed=seed, error=error)

    def cancel(self, command_id: str) -> Receipt:
        """Withdraw a command that still waits; one that was handed out or settled stays as it is.

        Raises:
            KeyError: There is no such command.
        """
        with self._lock:
            if command_id in self._waiting:
                del self._waiting[command_id]
                return self._settle(command_id, CommandState.CANCELLED)
            return self._receipts[command_id]

    def get(self, command_id: str) -> Receipt | None:
        """Where a command stands; ``None`` if it was never seen or is forgotten."""
        with self._lock:
            return self._receipts.get(command_id)

    @property
    def refused_full(self) -> int:
        """Commands refused because the queue was full."""
        with self._lock:
            return self._refused_full

    def _settle(
        self, command_id: str, state: CommandState, *, step: int | None = None, seed: str = "", error: str = ""
    ) -> Receipt:
        receipt = replace(self._receipts[command_id], state=state, step=step, seed=seed, error=error)
        self._receipts[command_id] = receipt
        settled = [known for known, kept in self._receipts.items() if kept.state is not CommandState.QUEUED]
        for old in settled[: max(0, len(settled) - self._remembered)]:
            del self._receipts[old]
        return receipt
