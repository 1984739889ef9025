"""The table of topics is complete, known to protobuf, and equal to the comments of the contract."""

from __future__ import annotations

import re
from pathlib import Path

from esper.events.v1 import events_pb2
from services.oona.topics import PLATFORM_TOPICS, TopicSpec, platform_specs

ROOT = Path(__file__).resolve().parents[2]


def test_the_table_equals_the_comments_of_the_contract() -> None:
    text = (ROOT / "proto/esper/events/v1/events.proto").read_text(encoding="utf-8")
    declared: dict[str, list[str]] = {}
    for comment, message in re.findall(r"((?:^//[^\n]*\n)+)message (\w+)", text, re.MULTILINE):
        topic = re.search(r"^// Topic ([a-z_.]+),", comment)
        if topic is not None:
            declared.setdefault(topic.group(1), []).append(f"esper.events.v1.{message}")
    assert declared == {topic: list(types) for topic, types in PLATFORM_TOPICS.items()}


def test_every_payload_type_exists() -> None:
    known = {descriptor.full_name for descriptor in events_pb2.DESCRIPTOR.message_types_by_name.values()}
    assert {name for types in PLATFORM_TOPICS.values() for name in types} <= known


def test_each_platform_topic_has_its_twin() -> None:
    specs = platform_specs(partitions=2, retention_bytes=7)
    assert [spec.name for spec in specs if not spec.is_dead_letter] == list(PLATFORM_TOPICS)
    for topic, twin in zip(specs[::2], specs[1::2], strict=True):
        assert twin.name == topic.dead_letter_name == f"{topic.name}.dlq"
        assert twin.is_dead_letter
        assert twin.payload_types == topic.payload_types
        assert (twin.partitions, twin.retention_bytes) == (2, 7)


def test_the_time_of_creation_does_not_make_a_topic_another() -> None:
    topic = TopicSpec("t", ("a.B",), 1, 10, created_ns=1)
    assert topic.same_as(TopicSpec("t", ("a.B",), 1, 10))
    assert not topic.same_as(TopicSpec("t", ("a.B",), 2, 10))
