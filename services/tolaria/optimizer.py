"""torch's SGD or AdamW over a network whose parameters come and go.

Survivors keep their state because torch keys it by the Parameter object; newborns have groups of their own (their own
rate, their own step count: AdamW's bias correction is per tensor); fused parameters inherit the state of their parts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from services.chassis.config.schema import OptimizerConfig
from services.kasmina.model import ParameterGroup, Replacement
from services.tolaria.errors import CheckpointError
from services.tolaria.schedule import Schedule

_BETAS: Final = (0.9, 0.999)


class GrowingOptimizer:
    """The optimizer of one arm. Call :meth:`sync` after every change of the network, before the next step."""

    def __init__(self, config: OptimizerConfig, schedule: Schedule) -> None:
        self._config = config
        self._schedule = schedule
        self._groups: list[ParameterGroup] = []
        self._torch = self._build()
        #: Factor on every rate; the governor lowers it after a rollback with no seed to blame.
        self.rate_scale = 1.0

    def _build(self) -> torch.optim.Optimizer:
        config, placeholder = self._config, [nn.Parameter(torch.zeros(()))]
        if config.name == "adamw":
            return torch.optim.AdamW(
                placeholder, lr=config.learning_rate, weight_decay=config.weight_decay, betas=_BETAS
            )
        return torch.optim.SGD(
            placeholder,
            lr=config.learning_rate,
            momentum=config.momentum,
            nesterov=config.momentum > 0,
            weight_decay=config.weight_decay,
        )

    def sync(self, groups: Sequence[ParameterGroup], replaced: Iterable[Replacement] = ()) -> None:
        """Take ``groups`` for the network's parameters from now on; ``replaced`` hand their parts' state over first."""
        for fusion in replaced:
            self._carry_over(fusion)
        self._groups = list(groups)
        self._torch.param_groups = [{**self._torch.defaults, "params": list(group.parameters)} for group in groups]
        alive = {parameter for group in groups for parameter in group.parameters}
        for parameter in [parameter for parameter in self._torch.state if parameter not in alive]:
            del self._torch.state[parameter]

    def zero_grad(self) -> None:
        """Drop all gradients."""
        for group in self._groups:
            for parameter in group.parameters:
                parameter.grad = None

    def step(self, step: int) -> None:
        """One update at the rates of optimizer step ``step`` (from 0); frozen groups are skipped."""
        for group, torch_group in zip(self._groups, self._torch.param_groups, strict=True):
            torch_group["lr"] = self.rate(step, group.birth_step)
            if not group.trainable:
                for parameter in group.parameters:
                    parameter.grad = None
            if self._config.clip_norm is not None:
                # Per group: a norm over all of them would let a seed change what its host learns.
                nn.utils.clip_grad_norm_(list(group.parameters), self._config.clip_norm)
        self._torch.step()

    def rate(self, step: int, birth_step: int = 0) -> float:
        """Learning rate at ``step`` of what was born at ``birth_step``."""
        return self._schedule.rate(step, birth_step) * self.rate_scale

    def state(self) -> dict[str, Tensor]:
        """All state tensors by ``<group>/<index in the group>/<name>``, in the order of the groups."""
        found: dict[str, Tensor] = {}
        for group in self._groups:
            for index, parameter in enumerate(group.parameters):
                for name, value in self._torch.state.get(parameter, {}).items():
                    found[f"{group.name}/{index}/{name}"] = value
        return found

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`state`, after :meth:`sync` with groups of the same names, order and shapes.

        Raises CheckpointError for a tensor that belongs to no parameter.
        """
        parameters = {
            f"{group.name}/{index}": parameter
            for group in self._groups
            for index, parameter in enumerate(group.parameters)
        }
        self._torch.state.clear()
        for key, value in state.items():
            owner, _, name = key.rpartition("/")
            if owner not in parameters:
                raise CheckpointError(
                    f"the checkpoint has optimizer state for {owner!r}, which this network does not have"
                )
            self._torch.state[parameters[owner]][name] = value.clone()

    def _carry_over(self, fusion: Replacement) -> None:
        """Assemble the state of ``fusion.new`` from that of its parts.

        AdamW divides by a bias correction that depends on the step count; where the parts' counts differ, moments are
        rescaled so that each part's corrected moments stay what they were.
        """
        states = [(self._torch.state.get(part), where) for part, where in fusion.parts]
        steps = [float(state["step"]) for state, _ in states if state and "step" in state]
        merged: dict[str, Any] = {}
        for state, where in states:
            for name, value in (state or {}).items():
                if name == "step":
                    merged[name] = torch.tensor(max(steps), dtype=value.dtype)
                else:
                    target = merged.setdefault(name, torch.zeros_like(fusion.new, requires_grad=False))
                    target[where] = value * _bias_ratio(
                        name, float((state or {}).get("step", 0.0)), max(steps, default=0.0)
                    )
        if merged:
            self._torch.state[fusion.new] = merged


def _bias_ratio(name: str, old_step: float, new_step: float) -> float:
    """What a moment of ``old_step`` updates is multiplied by to look like one of ``new_step``; 1 without a count."""
    if old_step == new_step or name not in ("exp_avg", "exp_avg_sq"):
        return 1.0
    beta = _BETAS[0] if name == "exp_avg" else _BETAS[1]
    return float((1.0 - beta**new_step) / (1.0 - beta**old_step))
