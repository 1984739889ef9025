"""One real Kafka broker for a test session."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.infrastructure.processes import ROOT, ScriptedServer, free_ports, need


class KafkaBroker:
    """A broker on loopback whose data survive `kill9` and `start`.

    Attributes:
        bootstrap: `host:port` for clients; the same after a restart.
        data: folder of its log and of `broker.log`.
    """

    def __init__(self, data: Path) -> None:
        """Prepares a broker in an empty or former data folder; nothing runs before `start`."""
        port, controller = free_ports(2)
        self.bootstrap = f"127.0.0.1:{port}"
        self.data = data
        self._server = ScriptedServer(
            "kafka",
            [
                str(ROOT / "deploy/kafka/start.sh"),
                "--until-eof",
                *("--port", str(port), "--controller-port", str(controller), "--data", str(data)),
            ],
        )

    @property
    def running(self) -> bool:
        """Whether it was started and neither stopped nor killed since."""
        return self._server.running

    def start(self) -> None:
        """Starts it, or starts it again; returns when it serves.

        Raises:
            RuntimeError: it did not start.
        """
        self._server.start()

    def kill9(self) -> None:
        """Ends it with SIGKILL, without a word to its clients, and waits until it is gone."""
        process = int((self.data / "kafka.pid").read_text(encoding="utf-8"))
        os.kill(process, signal.SIGKILL)
        self._server.stop()

    def stop(self) -> None:
        """Ends it in order."""
        self._server.stop()


@pytest.fixture(scope="session")
def _kafka_session() -> Iterator[KafkaBroker]:
    need(
        shutil.which("java") is not None and shutil.which("mvn") is not None,
        "Java and Maven are missing, a Kafka broker needs them (`make test` installs them where it can)",
    )
    data = Path(tempfile.mkdtemp(prefix="esper-kafka-"))
    broker = KafkaBroker(data)
    try:
        broker.start()
        yield broker
    finally:
        broker.stop()
        shutil.rmtree(data, ignore_errors=True)


@pytest.fixture
def kafka_broker(_kafka_session: KafkaBroker) -> Iterator[KafkaBroker]:
    """The session's broker, running; a test may `kill9` and `start` it. Use topic names of your own."""
    yield _kafka_session
    if not _kafka_session.running:
        _kafka_session.start()
