"""What the training process tells its launcher: one JSON object a line over an inherited pipe.

Torch-free, shared by the training process (writes) and the launcher (reads). Every message has a ``kind``; a reader
ignores kinds it does not know, so that a newer training process may say more.

``epoch``     an epoch of an arm is over           :class:`EpochProgress`
``step``      where the loop is, about once a second :class:`StepProgress`
``seed``      a seed changed its state             :class:`SeedProgress`
``decision``  Tamiyo decided, or could not         :class:`DecisionProgress`
``status``    what the process does now            :class:`StatusProgress`
``summary``   the last line: ``summary.json``      :class:`SummaryProgress`
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final, Protocol

#: The arm that is the run itself; others are its controls.
GROWN: Final = "grown"


@dataclass(frozen=True, slots=True, kw_only=True)
class EpochProgress:
    """An epoch of ``arm`` ("grown", "host", "bigger" or "uniform") is over.

    ``epoch`` counts finished epochs from 1; ``train_loss`` is the mean over the epoch's steps, ``validation_accuracy``
    is in percent, ``parameters`` are all trainable ones, ``flops`` are forward FLOPs of one sample, ``seeds`` counts
    the run's seeds by lifecycle state.
    """

    kind: ClassVar[str] = "epoch"
    arm: str
    epoch: int
    epochs: int
    step: int
    steps: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    learning_rate: float
    seconds: float
    parameters: int
    flops: int
    seeds: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepProgress:
    """Where the loop is. ``step`` counts finished optimizer steps of ``arm``."""

    kind: ClassVar[str] = "step"
    arm: str
    epoch: int
    step: int
    steps: int
    loss: float
    learning_rate: float
    steps_per_second: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedProgress:
    """A seed of ``arm`` went from one lifecycle state to another.

    ``contribution`` is in points of validation accuracy with its interval, null until measured.
    """

    kind: ClassVar[str] = "seed"
    seed: str
    slot: str
    blueprint: str
    family: str
    size: int
    from_state: str
    to_state: str
    step: int
    epoch: int
    reason: str
    contribution: Mapping[str, float] | None = None
    arm: str = GROWN


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionProgress:
    """Tamiyo decided for ``arm`` (``decision`` is its id), or could not (it is null, ``explanation`` says why)."""

    kind: ClassVar[str] = "decision"
    decision: str | None
    epoch: int
    step: int
    plan: tuple[Mapping[str, Any], ...]
    explanation: str
    latency_ms: float
    arm: str = GROWN


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusProgress:
    """What the process does now.

    ``state`` is one of ``starting``, ``ready``, ``training``, ``paused``, ``comparing``, ``finishing``,
    ``interrupted``, ``failed``, ``succeeded``; ``message`` is for people; ``detail`` holds figures by name.
    """

    kind: ClassVar[str] = "status"
    state: str
    message: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SummaryProgress:
    """The last message of a run that ended by itself: the content of ``summary.json``."""

    kind: ClassVar[str] = "summary"
    summary: Mapping[str, Any]


Progress = EpochProgress | StepProgress | SeedProgress | DecisionProgress | StatusProgress | SummaryProgress
_KINDS: Final[Mapping[str, type[Progress]]] = {
    cls.kind: cls
    for cls in (EpochProgress, StepProgress, SeedProgress, DecisionProgress, StatusProgress, SummaryProgress)
}


def finite(value: Any) -> Any:
    """``value`` with every NaN and infinity replaced by None, containers included: JSON knows neither."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


class Pipe(Protocol):
    """Where messages go: ``services.chassis.process.Progress``."""

    def send(self, message: Mapping[str, Any]) -> bool:
        """Send one object; False where it was dropped."""
        ...


def message_json(message: Progress) -> dict[str, Any]:
    """``message`` as a JSON object. What is not finite becomes null."""
    fields = {item.name: finite(getattr(message, item.name)) for item in dataclasses.fields(message)}
    return {"kind": message.kind, **fields}


def encode(message: Progress) -> bytes:
    """``message`` as one line of JSON, newline included."""
    return json.dumps(message_json(message), separators=(",", ":")).encode() + b"\n"


def decode(line: bytes | str) -> Progress | None:
    """The message in ``line``; None for a kind this version does not know. Fields it does not know are ignored.

    Raises ValueError for a line that is no progress message at all.
    """
    content = json.loads(line)
    if not isinstance(content, dict) or "kind" not in content:
        raise ValueError(f"not a progress message: {line!r}")
    cls = _KINDS.get(content["kind"])
    if cls is None:
        return None
    known = {item.name: content[item.name] for item in dataclasses.fields(cls) if item.name in content}
    if "plan" in known:
        known["plan"] = tuple(known["plan"])
    try:
        return cls(**known)
    except TypeError as error:
        raise ValueError(f"not a progress message: {line!r}: {error}") from error


class ProgressWriter:
    """Sends messages to the launcher over the job's progress pipe; what does not fit is dropped and counted there."""

    def __init__(self, pipe: Pipe) -> None:
        self._pipe = pipe

    def write(self, message: Progress) -> None:
        """Send one message; never waits."""
        self._pipe.send(message_json(message))
