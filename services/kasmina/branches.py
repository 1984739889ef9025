"""A branch beside a span of the host: isolated, blended in by alpha, then simply added.

Isolated, the branch reads a detached input and learns by a loss of its own: a linear head on the pooled sum of
the host's (detached) output and the branch's. The host's output is returned as it is, so its values and its
gradients are bit-identical to those without a seed. (A straight-through trick instead diverged, and a zero
read-out starves the branch: measurements in the project's design notes.)
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import cast

import torch
from torch import Tensor, nn

from services.blueprints.builder.branches import Branch
from services.blueprints.families.family import BranchSource
from services.kasmina.blending import Evidence, Observed


class BridgeMode(StrEnum):
    """How a branch takes part in the forward pass."""

    ISOLATED = "isolated"
    BLENDED = "blended"


class Bridge(nn.Module):
    """A span of the host with a branch beside it.

    The branch keeps the channels it was built for: where the span has grown since, it reads and writes the first
    ones (newborn channels always come last), so widening and branches do not disturb each other.

    Attributes:
        host: The module that stood here before.
        branch: What is added to its output.
        head: Head of the branch's own loss; ``None`` once it is blended in.
        alpha: Share of the branch, a 0-d buffer (a Python number would recompile compiled graphs); gone once settled.
        off: Skip the branch: exactly the network without it.

    Args:
        host: The module to bridge.
        branch: The branch.
        channels: Channels it writes.
        spatial: Whether channels are the second dimension (maps) or the last one.
        reads: Channels it reads, if they are others.
        source: Whether it reads what enters the span or what leaves it.
    """

    alpha: Tensor

    def __init__(
        self,
        host: nn.Module,
        branch: Branch,
        *,
        channels: int,
        spatial: bool,
        reads: int | None = None,
        source: BranchSource = "input",
    ) -> None:
        super().__init__()
        self.host = host
        self.branch = branch
        self.head: nn.Linear | None = None
        self.reads = channels if reads is None else reads
        self.source = source
        self.channels = channels
        self.spatial = spatial
        self.mode = BridgeMode.BLENDED
        self.off = False
        self.logits: Tensor | None = None
        self.observed: Observed = ""
        self._evidence: Tensor | None = None
        self._share = 0.0
        self.register_buffer("alpha", next(branch.parameters()).new_zeros(()).detach())
        self.train(host.training)

    @property
    def share(self) -> float:
        """Value of alpha, 0..1."""
        return self._share

    def set_share(self, share: float) -> None:
        """Set alpha."""
        self._share = share
        self.alpha.fill_(share)

    def isolate(self, outputs: int, generator: torch.Generator) -> None:
        """Let the branch learn by its own loss only, through a fresh head of ``outputs`` logits."""
        reference = next(self.branch.parameters())
        head = nn.Linear(self.channels, outputs, device="meta").to_empty(device="cpu")
        with torch.no_grad():
            head.weight.copy_(torch.randn(head.weight.shape, generator=generator) / math.sqrt(self.channels))
            head.bias.zero_()
        self.head = head.to(device=reference.device, dtype=reference.dtype).train(self.training)
        self.mode = BridgeMode.ISOLATED

    def blend(self, observed: Observed = "") -> None:
        """Leave isolation: the branch enters the forward pass with its present share; its head is dropped.

        Args:
            observed: What to measure in each training step until alpha is 1.
        """
        self.observed = observed
        self.head = None
        self.logits = None
        self.mode = BridgeMode.BLENDED

    def settle(self) -> None:
        """The branch stays for good: it is simply added, and alpha is no longer part of the network's state."""
        self._share = 1.0
        self._buffers.pop("alpha", None)

    def forward(self, inputs: Tensor) -> Tensor:
        """The host's output, plus alpha times the branch's where it is blended in. Shapes are the host's."""
        outputs: Tensor = self.host(inputs)
        if self.off:
            return outputs
        if self.mode is BridgeMode.ISOLATED:
            if self.training and torch.is_grad_enabled():
                self._learn_alone(inputs, outputs)
            return outputs
        observing = bool(self.observed) and self.training and torch.is_grad_enabled()
        if self._share == 0.0:
            if observing:
                with torch.no_grad():
                    added = self.branch(self._read(inputs, outputs))
                self._observe(added, outputs, outputs)
            return outputs  # adding zero times something would turn -0.0 into 0.0
        added = self.branch(self._read(inputs, outputs))
        if observing:
            branched = added.detach()
            joined = self._add(outputs, self.alpha * added)
            self._observe(branched, outputs, joined)
            return joined
        if self._share != 1.0:
            added = self.alpha * added
        return self._add(outputs, added)

    def take_evidence(self, loss: float | None) -> Evidence:
        """What the last training step showed; read once."""
        found, self._evidence = self._evidence, None
        value = None if found is None else float(found)
        if self.observed == "change":
            return Evidence(loss, change=value)
        return Evidence(loss, agreement=value)

    def _observe(self, branched: Tensor, outputs: Tensor, joined: Tensor) -> None:
        """Measure the branch's (detached) output against the span's, or against the gradient once that is known."""
        if self.observed == "change":
            # A span that puts out nothing changes without bound: infinity, and alpha waits.
            self._evidence = branched.float().norm() / self._own(outputs.detach()).float().norm()
        elif joined.requires_grad:

            def look(gradient: Tensor) -> None:
                down, along = -self._own(gradient).float(), branched.float()
                self._evidence = (down * along).sum() / (down.norm() * along.norm())

            joined.register_hook(look)  # type: ignore[no-untyped-call]  # torch ships no annotation for it

    def _learn_alone(self, inputs: Tensor, outputs: Tensor) -> None:
        outputs = outputs.detach()
        joined = self._own(outputs) + self.branch(self._read(inputs.detach(), outputs))
        positions = (2, 3) if self.spatial else tuple(range(1, joined.dim() - 1))
        pooled = joined.mean(positions) if positions else joined
        self.logits = cast("nn.Linear", self.head)(pooled)

    def _read(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        return self._own(outputs) if self.source == "output" else self._first(inputs, self.reads)

    def _own(self, values: Tensor) -> Tensor:
        return self._first(values, self.channels)

    def _first(self, values: Tensor, channels: int) -> Tensor:
        dimension = 1 if self.spatial else values.dim() - 1
        if values.shape[dimension] == channels:
            return values
        return values.narrow(dimension, 0, channels)

    def _add(self, outputs: Tensor, added: Tensor) -> Tensor:
        dimension = 1 if self.spatial else outputs.dim() - 1
        extra = outputs.shape[dimension] - self.channels
        if extra == 0:
            return outputs + added
        rest = outputs.narrow(dimension, self.channels, extra)
        return torch.cat([self._own(outputs) + added, rest], dimension)
