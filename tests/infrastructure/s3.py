"""One real store with the S3 protocol for a test session, and an empty folder of its bucket for each test."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Final

import pytest

from services.chassis.config.schema import S3Config
from tests.infrastructure.processes import ROOT, ScriptedServer, free_ports, need

_START: Final = ROOT / "deploy/s3/start.sh"
_numbers = count(1)


@dataclass(frozen=True, slots=True)
class S3Store:
    """The server and how to reach it; ``folder`` holds its objects as files."""

    server: ScriptedServer
    endpoint_url: str
    credentials: dict[str, str]
    folder: Path


@pytest.fixture(scope="session")
def _s3_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Store]:
    found = subprocess.run([str(_START), "--find"], capture_output=True, check=False).returncode == 0
    need(found, "versitygw is missing (`make test` builds it where Go is)")
    data, [port] = tmp_path_factory.mktemp("s3"), free_ports(1)
    server = ScriptedServer("s3", [str(_START), "--until-eof", "--port", str(port), "--data", str(data)])
    try:
        server.start()
        lines = (data / "credentials").read_text(encoding="utf-8").split()
        credentials = {name: value for name, _, value in (line.partition("=") for line in lines)}
        yield S3Store(server, f"http://127.0.0.1:{port}", credentials, data / "objects" / "esper")
    finally:
        server.stop()


@pytest.fixture
def s3_store(_s3_store: S3Store, monkeypatch: pytest.MonkeyPatch) -> S3Store:
    """The store, its credentials in the environment."""
    for name, value in _s3_store.credentials.items():
        monkeypatch.setenv(name, value)
    return _s3_store


@pytest.fixture
def s3(s3_store: S3Store) -> S3Config:
    """Settings for a folder that is empty and this test's own."""
    return S3Config(bucket="esper", prefix=f"tests/{next(_numbers)}", endpoint_url=s3_store.endpoint_url)
