"""Fixtures and tiers of all tests.

The fast tier is everything but `slow`, `full`, `kafka`, `postgres` and `s3`. Tests of whole processes (integration,
faults, benchmarks) are `full`, and have the machine to themselves, unless they say `fast` or `parallel`; the latter are
`slow`. A module that is `parallel` may have tests that are `fast` or `full`. A test that asks for a broker, a database
or a store is marked by its fixture.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest

import services  # noqa: F401 - puts the generated contracts on sys.path
from tests.infrastructure.kafka import _kafka_session, kafka_broker
from tests.infrastructure.postgres import _postgres_port, postgres_url
from tests.infrastructure.s3 import _s3_store, s3, s3_store
from tests.infrastructure.short_run import short_run

__all__ = [
    "_kafka_session",
    "_postgres_port",
    "_s3_store",
    "kafka_broker",
    "postgres_url",
    "s3",
    "s3_store",
    "short_run",
]

_TESTS: Final = Path(__file__).parent
_WHOLE: Final = ("integration", "faults", "benchmarks")
_FIXTURES: Final = {"_kafka_session": "kafka", "_postgres_port": "postgres", "_s3_store": "s3"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests by folder and fixture, so that no tier depends on somebody's memory."""
    for item in items:
        folder = item.path.relative_to(_TESTS).parts[0]
        marked = {name for name in ("fast", "full", "parallel") if item.get_closest_marker(name) is not None}
        if marked == {"parallel"}:
            item.add_marker("slow")
        elif folder in _WHOLE and not marked:
            item.add_marker("full")
        for fixture, marker in _FIXTURES.items():
            if fixture in getattr(item, "fixturenames", ()):
                item.add_marker(marker)
