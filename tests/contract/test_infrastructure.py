"""The brokers and databases that the tests start are real, survive what they must and leave nothing behind."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from kafka import KafkaConsumer, KafkaProducer, TopicPartition
from kafka.admin import KafkaAdminClient, NewTopic

from tests.infrastructure.kafka import KafkaBroker
from tests.infrastructure.processes import ROOT, ScriptedServer, free_ports, need


@pytest.mark.slow
def test_broker_keeps_acknowledged_records_over_kill9(kafka_broker: KafkaBroker) -> None:
    admin = KafkaAdminClient(bootstrap_servers=kafka_broker.bootstrap)
    admin.create_topics([NewTopic("infrastructure", num_partitions=1, replication_factor=1)])
    admin.close()
    producer = KafkaProducer(bootstrap_servers=kafka_broker.bootstrap)
    producer.send("infrastructure", b"before").get(timeout=30)
    kafka_broker.kill9()
    assert not kafka_broker.running
    kafka_broker.start()
    producer.send("infrastructure", b"after").get(timeout=60)
    producer.close()
    consumer = KafkaConsumer(
        bootstrap_servers=kafka_broker.bootstrap, auto_offset_reset="earliest", consumer_timeout_ms=20_000
    )
    consumer.assign([TopicPartition("infrastructure", 0)])
    assert [next(consumer).value, next(consumer).value] == [b"before", b"after"]
    consumer.close()


def test_database_is_real_and_empty(postgres_url: str) -> None:
    with psycopg.connect(postgres_url.replace("+psycopg", "")) as connection:
        version = connection.execute("SHOW server_version").fetchone()
        tables = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
        connection.execute("CREATE TABLE left_behind (id int)")
    assert version is not None
    assert int(str(version[0]).split(".", maxsplit=1)[0]) >= 13
    assert tables == (0,)


def test_next_test_gets_another_database(postgres_url: str) -> None:
    with psycopg.connect(postgres_url.replace("+psycopg", "")) as connection:
        tables = connection.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'").fetchone()
    assert tables == (0,)


@pytest.mark.slow
def test_a_server_does_not_outlive_the_process_that_started_it(tmp_path: Path) -> None:
    need(shutil.which("java") is not None and shutil.which("mvn") is not None, "Java and Maven are missing")
    program = (
        "import sys, time; from pathlib import Path; from tests.infrastructure.kafka import KafkaBroker;"
        "broker = KafkaBroker(Path(sys.argv[1])); broker.start(); print('up', flush=True); time.sleep(600)"
    )
    starter = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
    assert starter.stdout is not None
    assert starter.stdout.readline() == b"up\n"
    broker = int((tmp_path / "kafka.pid").read_text(encoding="utf-8"))
    watch = os.pidfd_open(broker)
    os.kill(starter.pid, signal.SIGKILL)
    starter.wait()
    starter.stdout.close()
    assert wait_for_end(watch, seconds=40), "the broker is still there although its starter was killed"


def test_a_server_that_cannot_start_says_why(tmp_path: Path) -> None:
    server = ScriptedServer("kafka", [str(ROOT / "deploy/kafka/start.sh"), "--no-such-option"])
    with pytest.raises(RuntimeError, match="kafka did not start"):
        server.start()
    assert not server.running
    server.stop()


def test_missing_program_skips_at_home_and_fails_in_ci(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "false")
    with pytest.raises(pytest.skip.Exception, match="Java"):
        need(False, "Java is missing")
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="Java"):
        need(False, "Java is missing")
    need(True, "nothing is missing")


def test_free_ports_are_distinct() -> None:
    assert len(set(free_ports(5))) == 5


def wait_for_end(process: int, *, seconds: float) -> bool:
    """Waits until the process behind a pidfd has ended; False when it has not within that time."""
    poller = select.poll()
    poller.register(process, select.POLLIN)
    ended = bool(poller.poll(seconds * 1000))
    os.close(process)
    return ended
