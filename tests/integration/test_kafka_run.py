"""configs/kafka.yaml: the quick start with its events on a real Kafka broker; and without one."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from kafka import KafkaConsumer, TopicPartition

from tests.infrastructure.kafka import KafkaBroker
from tests.infrastructure.processes import free_ports
from tests.infrastructure.runs import SHORT, json_lines, running

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(300)]


def _stored(broker: KafkaBroker, topic: str) -> list[bytes]:
    """All records of a topic, read without Esper."""
    consumer = KafkaConsumer(bootstrap_servers=broker.bootstrap, consumer_timeout_ms=20_000)
    try:
        partitions = [TopicPartition(topic, number) for number in sorted(consumer.partitions_for_topic(topic) or ())]
        consumer.assign(partitions)
        for partition in partitions:
            consumer.seek_to_beginning(partition)
        expected = sum(consumer.end_offsets(partitions).values())
        return [next(consumer).value for _ in range(expected)]
    finally:
        consumer.close()


def test_the_same_job_with_its_events_on_kafka(kafka_broker: KafkaBroker, tmp_path: Path) -> None:
    prefix = f"run-{uuid.uuid4().hex[:8]}."
    kafka = "services.oona.kafka"
    overrides = (*SHORT, f"{kafka}.bootstrap_servers=[{kafka_broker.bootstrap}]", f"{kafka}.topic_prefix={prefix}")
    with running(tmp_path, *overrides, config="configs/kafka.yaml") as run:
        ended = run.wait()
        folder = run.folder
        assert ended.code == 0, ended.err
        assert run.left_over() == []
    assert ended.summary["events"]["dropped"] == 0
    assert ended.summary["adaptations"]["fossilized"] > 0
    transitions = [event for event in json_lines(folder / "events.jsonl") if event["kind"] == "transition"]
    found = _stored(kafka_broker, f"{prefix}telemetry.seed.transitions")
    assert len(found) == len(transitions)
    for seed in {event["seed"] for event in transitions}:
        assert any(seed.encode() in record for record in found)
    seeds = len(ended.summary["seeds"])
    assert len(_stored(kafka_broker, f"{prefix}compilation.kernel.ready")) == seeds
    assert len(_stored(kafka_broker, f"{prefix}innovation.field_reports")) == seeds
    # An event per epoch, and the states of the run: training, finishing, succeeded.
    assert len(_stored(kafka_broker, f"{prefix}system.events.epoch")) == 16 + 3


def test_a_broker_that_is_not_there_is_said_in_one_line(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    overrides = (
        f"services.oona.kafka.bootstrap_servers=[127.0.0.1:{port}]",
        "services.startup_timeout_seconds=8",
        "compare=[]",
    )
    with running(tmp_path, *overrides, config="configs/kafka.yaml") as run:
        ended = run.wait()
        assert ended.code == 3, ended.err
        assert "Traceback" not in ended.err
        (line,) = (line for line in ended.err.splitlines() if line.startswith("train.py: "))
        assert "oona" in line
        assert run.left_over() == []
