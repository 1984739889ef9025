"""Takes a culled seed's steps back: under ``evaluation.cull: rewind`` a trial that failed never was.

A snapshot is kept for each seed in the network that is not settled, taken at its graft, before any step with it. When
the seed is culled, the trainer restores it, takes the seed out and makes the steps since then again on the same data.
What other seeds became meanwhile would be undone by that; then the seed is only removed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Final

from torch import Tensor

from services.kasmina.lifecycle import ALIVE, IN_FORWARD, SeedState
from services.kasmina.model import SeedRecord
from services.tolaria.checkpoint import State

_PREFIX: Final = "snapshot/"
#: States that a seed walks through by steps alone: made again, they lead to the same place.
_BY_STEPS: Final = frozenset({SeedState.GRAFTING, SeedState.STABILIZATION, SeedState.EVALUATING})


class NoWayBackError(ValueError):
    """The steps of a culled seed cannot be taken back; says why."""


class Snapshots:
    """The snapshots of a run by seed: one for each seed on trial, those grafted together share theirs."""

    def __init__(self) -> None:
        self._states: dict[str, State] = {}

    def missing(self, records: Iterable[SeedRecord]) -> set[str]:
        """Seeds on trial without a snapshot."""
        return _on_trial(records) - self._states.keys()

    def forget_settled(self, records: Iterable[SeedRecord]) -> None:
        """Forget seeds that are no longer on trial."""
        on_trial = _on_trial(records)
        self._states = {seed: state for seed, state in self._states.items() if seed in on_trial}

    def keep(self, seeds: Iterable[str], state: State) -> None:
        """``state`` is that of these seeds' graft."""
        self._states |= dict.fromkeys(seeds, state)

    def forget_from(self, step: int) -> None:
        """Forget what was taken at ``step`` or later: the run stands there again, or before."""
        self._states = {seed: state for seed, state in self._states.items() if state.values["step"] < step}

    def way_back(self, culled: Collection[str], records: Sequence[SeedRecord], traceless: Collection[str]) -> State:
        """The state to go back to, so that the seeds in ``culled`` have never been grafted.

        Args:
            culled: Seeds that left just now.
            records: All seeds of the run.
            traceless: Those that are gone as if they had never been.

        Raises:
            NoWayBackError: There is no snapshot of a graft, or another seed became something else since.
        """
        found = [state for seed, state in self._states.items() if seed in culled]
        if len(found) < len(culled):
            raise NoWayBackError("there is no snapshot of its graft: the run was not asked to rewind then")
        first = min(found, key=lambda state: int(state.values["step"]))
        others = [record for record in records if record.seed not in culled and record.seed not in traceless]
        if changed := _changed_since(first.values["engine"], others):
            raise NoWayBackError(f"it would undo what became of {', '.join(changed)} since the graft")
        return first

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


def _on_trial(records: Iterable[SeedRecord]) -> set[str]:
    return {record.seed for record in records if record.state in ALIVE & IN_FORWARD}


def _changed_since(snapshot: Mapping[str, Any], records: Iterable[SeedRecord]) -> list[str]:
    """Seeds that were germinated, grafted, judged or lost since ``snapshot``, an engine's state as JSON."""
    before = {item["seed"]: _stage(SeedState(item["state"]), item["outcome"]) for item in snapshot["seeds"]}
    return [record.seed for record in records if before.get(record.seed) != _stage(record.state, record.outcome)]


def _stage(state: SeedState, outcome: str | None) -> str:
    if outcome is not None:
        return str(outcome)
    return "on trial" if state in _BY_STEPS else str(state)
