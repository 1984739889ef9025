"""How our topics are called on a broker that others may share."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TopicNames:
    """Puts a prefix before each topic's name."""

    prefix: str

    def kafkas(self, topic: str) -> str:
        """The broker's name of our topic."""
        return self.prefix + topic

    def ours(self, kafka_topic: str) -> str:
        """Our name of the broker's topic."""
        return kafka_topic.removeprefix(self.prefix)
