"""What Oona counts; rises only, from the start of the process."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Counters:
    """Numbers for logs and for whoever scrapes the service."""

    published: int = 0
    duplicates: int = 0
    rejected: int = 0
    overloaded: int = 0
    delivered: int = 0
    redelivered: int = 0
    acknowledged: int = 0
    dead_lettered: int = 0
    redriven: int = 0
    tail_skipped: int = 0
