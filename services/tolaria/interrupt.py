"""Stopping a run before its end. Torch-free."""

from __future__ import annotations


class TrainingInterruptedError(Exception):
    """The run stopped before its end, on somebody's word; its checkpoint is saved."""


class Interrupt:
    """Set by a signal handler or a caller, seen at the next safe point.

    ``asked_by_caller`` tells a caller's StopRun from a signal.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.asked_by_caller = False

    def request(self, reason: str, *, by_caller: bool = False) -> None:
        """Stop at the next safe point; the first reason stays."""
        if self.reason is None:
            self.reason, self.asked_by_caller = reason, by_caller
