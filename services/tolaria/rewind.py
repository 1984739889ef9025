"""Takes a culled seed's steps back: under ``evaluation.cull: rewind`` a trial that failed never was.

A snapshot is kept for each seed in the network that is not settled, taken at its graft, before any step with it. When
the seed is culled, the trainer restores it, takes the seed out and makes the steps since then again on the same data.
What other seeds became meanwhile would be undone by that; then the seed is only removed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor

from services.kasmina.lifecycle import ALIVE, IN_FORWARD, SeedState
from services.kasmina.model import SeedRecord
from services.tolaria.checkpoint import State

_PREFIX: Final = "snapshot/"
#: States that a seed walks through by steps alone: made again, they lead to the same place.
_BY_STEPS: Final = frozenset({SeedState.GRAFTING, SeedState.STABILIZATION, SeedState.EVALUATING})


class Snapshots:
    """The snapshots of a run by seed: one for each seed on trial, those grafted together share theirs."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}

    def of(self, seed: str) -> State | None:
        """The state at the seed's graft; None if there is none."""
        return self._states.get(seed)

    def missing(self, records: Iterable[SeedRecord]) -> list[str]:
        """Forget seeds that are no longer on trial; those on trial without a snapshot."""
        on_trial = [record.seed for record in records if record.state in ALIVE & IN_FORWARD]
        self._states = {seed: state for seed, state in self._states.items() if seed in on_trial}
        return [seed for seed in on_trial if seed not in self._states]

    def keep(self, seeds: Iterable[str], state: State) -> None:
        """``state`` is that of these seeds' graft."""
        self._states |= dict.fromkeys(seeds, state)

    def forget_from(self, step: int) -> None:
        """Forget what was taken at ``step`` or later: the run stands there again, or before."""
        self._states = {seed: state for seed, state in self._states.items() if state.values["step"] < step}

    def packed(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and values for a checkpoint, each shared state once."""
        tensors: dict[str, Tensor] = {}
        shared: dict[int, list[str]] = {}
        states = {id(state): state for state in self._states.values()}
        for seed, state in self._states.items():
            shared.setdefault(id(state), []).append(seed)
        values: dict[str, Any] = {}
        for key, seeds in shared.items():
            state, name = states[key], seeds[0]
            tensors |= {f"{_PREFIX}{name}/{tensor}": value for tensor, value in state.tensors.items()}
            values[name] = {"seeds": seeds, "values": state.values}
        return tensors, values

    def unpack(self, state: State) -> None:
        """The snapshots of a checkpoint instead of these."""
        self._states = {}
        for name, content in state.values.get("snapshots", {}).items():
            prefix = f"{_PREFIX}{name}/"
            tensors = {
                key.removeprefix(prefix): value for key, value in state.tensors.items() if key.startswith(prefix)
            }
            self.keep(content["seeds"], State(tensors, content["values"]))


def changed_since(snapshot: Mapping[str, Any], records: Sequence[SeedRecord], culled: Iterable[str]) -> list[str]:
    """Seeds beside ``culled`` that became something else since ``snapshot`` (an engine's state as JSON).

    Germinated, grafted, judged or gone since: a rewind would undo it.
    """
    before = {item["seed"]: _stage(SeedState(item["state"]), item["outcome"]) for item in snapshot["seeds"]}
    gone = set(culled)
    return [
        record.seed
        for record in records
        if record.seed not in gone and before.get(record.seed) != _stage(record.state, record.outcome)
    ]


def _stage(state: SeedState, outcome: str | None) -> str:
    if outcome is not None:
        return str(outcome)
    return "on trial" if state in _BY_STEPS else str(state)
