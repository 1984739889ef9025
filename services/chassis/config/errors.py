"""What is wrong with a configuration: everything at once, each with its place and the way out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake: ``place`` is ``file:line``, an environment variable, ``--set`` or a file that is not there."""

    place: str
    key: str
    reason: str
    suggestion: str = ""

    def __str__(self) -> str:
        key = f"{self.key}: " if self.key else ""
        hint = f" ({self.suggestion})" if self.suggestion else ""
        return f"{self.place}: {key}{self.reason}{hint}"


class ConfigError(Exception):
    """A configuration that cannot be used; ``str()`` is a message for people, one line per problem."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__("\n".join([f"configuration: {head}", *(f"  {problem}" for problem in self.problems)]))
