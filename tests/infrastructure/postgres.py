"""One real PostgreSQL server for a test session, and an empty database for each test."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Final

import psycopg
import pytest

from tests.infrastructure.processes import ROOT, ScriptedServer, free_ports, need

_START: Final = ROOT / "deploy/postgres/start.sh"
_numbers = count(1)


@pytest.fixture(scope="session")
def _postgres_port() -> Iterator[int]:
    found = subprocess.run([str(_START), "--find"], capture_output=True, check=False).returncode == 0
    need(found, "PostgreSQL is missing (`make test` installs it where it can)")
    # Not below pytest's own folder: only root may enter that, and the server runs as another user.
    data, [port] = Path(tempfile.mkdtemp(prefix="esper-postgres-")), free_ports(1)
    command = [str(_START), "--until-eof", "--port", str(port), "--data", str(data), "--", "-c", "fsync=off"]
    server = ScriptedServer("postgres", command)
    try:
        server.start()
        yield port
    finally:
        server.stop()
        shutil.rmtree(data, ignore_errors=True)


@pytest.fixture
def postgres_url(_postgres_port: int) -> Iterator[str]:
    """SQLAlchemy URL of a database that is empty and this test's own."""
    name = f"esper_{next(_numbers)}"
    server = f"postgresql://esper@127.0.0.1:{_postgres_port}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f'CREATE DATABASE "{name}"'.encode())
    yield f"postgresql+psycopg://esper@127.0.0.1:{_postgres_port}/{name}"
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f'DROP DATABASE "{name}" WITH (FORCE)'.encode())
