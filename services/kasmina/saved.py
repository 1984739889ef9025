"""A growing network's topology and its seeds' lives as JSON, checked once when it comes back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

from services.blueprints.spec import Blueprint, Interface
from services.kasmina.blending import BlendState
from services.kasmina.errors import TopologyError
from services.kasmina.graph import Analysis
from services.kasmina.lifecycle import SeedState
from services.kasmina.model import Contribution, SeedRecord

STATE_VERSION = 1


@dataclass(frozen=True, slots=True)
class BranchPlan:
    """What it takes to build a branch again: the design and the place it was compiled for."""

    blueprint: Blueprint
    interface: Interface


@dataclass(frozen=True, slots=True)
class SavedTopology:
    """What a checkpoint holds besides weights.

    Attributes:
        host: Fingerprint of the host's slots; a topology fits only the host it was saved from.
        step: Optimizer steps made.
        epoch: Epoch last heard of.
        fused: Channels that are part of the host's own layers now, by WIDTH slot.
        grafts: Seeds with parts of their own in the network, in the order of their grafting.
        plans: What the branches among them are.
        records: All seeds of the run, oldest first.
        penalties: Penalty of each blueprint by slot and blueprint id.
        quarantined: Blueprints that were blamed for a rollback.
    """

    host: str
    step: int
    epoch: int
    fused: Mapping[str, int]
    grafts: Sequence[str]
    plans: Mapping[str, BranchPlan]
    records: Mapping[str, SeedRecord]
    penalties: Mapping[str, Mapping[str, float]]
    quarantined: frozenset[str]

    def to_json(self) -> dict[str, Any]:
        """As JSON; :meth:`from_json` is the inverse."""
        return {
            "version": STATE_VERSION,
            "host": self.host,
            "step": self.step,
            "epoch": self.epoch,
            "fused": {slot: extra for slot, extra in self.fused.items() if extra},
            "grafts": list(self.grafts),
            "plans": {
                seed: {"blueprint": plan.blueprint.to_json(), "interface": plan.interface.to_json()}
                for seed, plan in self.plans.items()
            },
            "seeds": [record_json(record) for record in self.records.values()],
            "penalties": {slot: dict(penalties) for slot, penalties in self.penalties.items()},
            "quarantined": sorted(self.quarantined),
        }

    @classmethod
    def from_json(cls, state: Mapping[str, Any], *, host: str, analysis: Analysis) -> Self:
        """From JSON, for a host.

        Args:
            state: What :meth:`to_json` returned.
            host: Fingerprint of the host it is for.
            analysis: Where that host can grow.

        Raises:
            TopologyError: It is of another version or another host, or damaged.
        """
        if state.get("version") != STATE_VERSION:
            raise TopologyError(f"topology version {state.get('version')!r} is not {STATE_VERSION}")
        if state.get("host") != host:
            raise TopologyError("the topology was saved for another host")
        try:
            saved = cls(
                host=host,
                step=int(state["step"]),
                epoch=int(state["epoch"]),
                fused={str(slot): int(extra) for slot, extra in state["fused"].items()},
                grafts=tuple(state["grafts"]),
                plans={
                    seed: BranchPlan(Blueprint.from_json(plan["blueprint"]), Interface.from_json(plan["interface"]))
                    for seed, plan in state["plans"].items()
                },
                records={item["seed"]: _record(item) for item in state["seeds"]},
                penalties={slot: dict(found) for slot, found in state["penalties"].items()},
                quarantined=frozenset(state["quarantined"]),
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise TopologyError(f"the topology is damaged: {error!r}") from error
        saved._check(analysis)
        return saved

    def _check(self, analysis: Analysis) -> None:
        for slot, extra in self.fused.items():
            if slot not in analysis.slots or extra < 0:
                raise TopologyError(f"the topology is damaged: slot {slot!r} has {extra} fused channels")
        for seed in self.grafts:
            record = self.records.get(seed)
            places = analysis.spans if seed in self.plans else analysis.slots
            if record is None or record.slot not in places or record.size < 1:
                raise TopologyError(f"the topology is damaged: seed {seed!r} has no place")


def record_json(record: SeedRecord) -> dict[str, Any]:
    """``record`` as JSON."""
    # Not with asdict, which copies every field deeply: all seeds that ever lived are written at every transition.
    content = _flat(record)
    for name in ("contribution", "plan_contribution", "blend"):
        content[name] = None if content[name] is None else _flat(content[name])
    return content


def _flat(item: SeedRecord | Contribution | BlendState) -> dict[str, Any]:
    return {field.name: getattr(item, field.name) for field in fields(item)}


def _record(item: Mapping[str, Any]) -> SeedRecord:
    outcome = item["outcome"]
    values = {
        **item,
        "state": SeedState(item["state"]),
        # Nor have states saved before blending had schedules.
        "blend": None if item.get("blend") is None else BlendState(**item["blend"]),
        "outcome": None if outcome is None else SeedState(outcome),
        "contribution": _contribution(item["contribution"]),
        # States saved before plans were judged have none.
        "plan_contribution": _contribution(item.get("plan_contribution")),
    }
    return SeedRecord(**values)


def _contribution(item: Mapping[str, Any] | None) -> Contribution | None:
    return None if item is None else Contribution(**item)
