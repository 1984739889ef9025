"""What Kasmina says about a network: plain, frozen and torch-free records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from services.blueprints.spec import SlotKind
from services.blueprints.vocabulary import LayerSpec
from services.kasmina.blending import BlendState
from services.kasmina.lifecycle import SeedState

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

SPAN_PREFIX = "span:"


@dataclass(frozen=True, slots=True)
class SlotInfo:
    """A place where the network can grow.

    Attributes:
        name: Path of the first writer for a WIDTH slot, ``span:<path>`` for a SPAN slot.
        kind: What kind of place it is.
        width: Channels (or features) as of now, seeds under way included; of a SPAN, those it puts out.
        host_width: Channels before any growth.
        writers: Module paths that write the channels, in forward order.
        followers: Module paths that follow them one by one (normalization, depthwise convolution).
        readers: Module paths that read them.
    """

    name: str
    kind: SlotKind
    width: int
    host_width: int
    writers: tuple[str, ...] = ()
    followers: tuple[str, ...] = ()
    readers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class SlotHealth:
    """How a WIDTH slot uses its channels. ``None`` was not measured; it is never zero for that reason.

    Attributes:
        slot: Name of the slot.
        width: Channels at the time.
        effective_rank: exp(entropy) of the eigenvalues of the channels' correlation matrix, 1..width
            (Roy & Vetterli, "The effective rank", 2007); the largest over the slot's readers.
        participation_ratio: (sum of eigenvalues)^2 / (sum of squares) of the covariance, 1..width.
        utilization: ``effective_rank / width``.
        dead_ratio: Share of channels that did not vary on the sample, 0..1.
        gradient_norm: L2 norm of the writers' weight gradients of the last backward pass.
        samples: Images (not positions) behind the figures.
        unmeasured_reason: Why something is ``None``; empty otherwise.
    """

    slot: str
    width: int
    effective_rank: float | None
    participation_ratio: float | None
    utilization: float | None
    dead_ratio: float | None
    gradient_norm: float | None
    samples: int
    unmeasured_reason: str = ""


@dataclass(frozen=True, slots=True)
class HealthReport:
    """One health measurement of all WIDTH slots.

    Attributes:
        slots: One entry per slot, in forward order.
        flops: What the measurement cost in forward FLOPs; it is billed to growth.
        samples: Images looked at.
    """

    slots: tuple[SlotHealth, ...]
    flops: float
    samples: int


@dataclass(frozen=True, slots=True)
class CostTerm:
    """One summand of the network's cost: coefficient times the product of the widths of ``slots``.

    Attributes:
        flops: Forward FLOPs per sample (2 per multiply-add) per unit of the product.
        parameters: Parameters per unit of the product.
        slots: Slots whose widths are multiplied; may repeat; empty for a fixed cost.
    """

    flops: float
    parameters: float
    slots: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Contribution:
    """What a seed is worth: accuracy with it minus accuracy without it, same weights and batches.

    Attributes:
        points: Estimate, points of validation accuracy.
        low: Lower bound of the interval.
        high: Upper bound of the interval.
        confidence: Of the interval, 0..1.
        samples: Images behind it.
    """

    points: float
    low: float
    high: float
    confidence: float
    samples: int


@dataclass(frozen=True, slots=True)
class LayerChange:
    """One row of the table of what growth changed.

    Attributes:
        path: Module path in the host as it was built.
        operation: Operation of the layer, or ``branch:<family>``.
        before_shape: Shape of its weight before any growth; empty for a branch.
        after_shape: Shape of its weight now; for a branch (input channels, inner width, output channels).
        layers: Layers of a branch in forward order, enough to build it again. It reads and writes the first
            channels of the module at ``path``, whose tensors are under ``<path>.host`` then, its own under
            ``<path>.branch.<layer>``; a second branch on the same path stands around the first.
        spatial: Whether a branch runs over maps [C, H, W]: its channels come first then, else last.
        source: What a branch reads: ``input`` or ``output`` of the module at ``path``.
    """

    path: str
    operation: str
    before_shape: tuple[int, ...]
    after_shape: tuple[int, ...]
    layers: tuple[LayerSpec, ...] = ()
    spatial: bool = False
    source: str = "input"


@dataclass(frozen=True, slots=True)
class SeedRecord:
    """One graft in one slot.

    Attributes:
        seed: Id of the seed.
        slot: Slot it sits in.
        blueprint: Id of its blueprint.
        family: Family of the blueprint.
        size: New channels of a widening, inner width of a branch.
        state: Where it is in its life.
        command_id: Command that germinated it.
        reason: Why it is in its state; of one whose slot is free again, how it ended.
        kernel: SHA-256 (hex) of its kernel; empty until loaded.
        interface_signature: Signature of the slot's interface at germination; the kernel must carry it.
        germinated_step: Optimizer step of its germination.
        germinated_epoch: Epoch of its germination.
        birth_step: Step at which its parameters entered the network.
        graft_epoch: Epoch at which it entered the forward pass.
        state_step: Step at which it entered its state.
        measurements: Counterfactuals taken in its present state.
        contribution: Last counterfactual; ``None`` while unmeasured.
        plan_contribution: Counterfactual of all seeds of its decision together, from when the first was judged;
            ``None`` if it was alone.
        alpha: Its share of the forward pass, 0..1.
        blend: Where its blending stands; ``None`` where it has not begun or there is nothing to blend.
        parameters: Parameters it added.
        flops: Forward FLOPs per sample it added.
        free_epoch: Epoch at which the embargo or lock it left behind ends.
        outcome: FOSSILIZED, CULLED, CANCELLED or ROLLED_BACK once its life is over, else ``None``.
    """

    seed: str
    slot: str
    blueprint: str
    family: str
    size: int
    state: SeedState
    command_id: str
    reason: str = ""
    kernel: str = ""
    interface_signature: str = ""
    germinated_step: int = 0
    germinated_epoch: int = 0
    birth_step: int | None = None
    graft_epoch: int | None = None
    state_step: int = 0
    measurements: int = 0
    contribution: Contribution | None = None
    plan_contribution: Contribution | None = None
    alpha: float = 0.0
    blend: BlendState | None = None
    parameters: int = 0
    flops: int = 0
    free_epoch: int | None = None
    outcome: SeedState | None = None


class SlotOccupancy(StrEnum):
    """What holds a slot."""

    FREE = "free"
    OCCUPIED = "occupied"
    EMBARGO = "embargo"
    LOCKED = "locked"


@dataclass(frozen=True, slots=True)
class SlotStatus:
    """Whether a slot can take a seed.

    Attributes:
        occupancy: What holds it.
        free_epoch: Epoch at which an embargo or lock ends, else ``None``.
        penalties: Penalty of each blueprint that failed here, by blueprint id.
        seeds: Seeds under way or fossilized here, oldest first.
    """

    occupancy: SlotOccupancy
    free_epoch: int | None = None
    penalties: Mapping[str, float] = field(default_factory=dict)
    seeds: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Replacement:
    """A new Parameter that stands in for old ones, so that the optimizer can carry their state over.

    Attributes:
        new: The Parameter that is in the network from now on.
        parts: Old Parameter and the index of ``new`` that it fills: per dimension a slice, or (at most once) the
            numbers of its entries where they do not stand together. Together the parts cover ``new`` exactly once.
    """

    new: Parameter
    parts: tuple[tuple[Parameter, tuple[slice | Tensor, ...]], ...]


@dataclass(frozen=True, slots=True, eq=False)
class SeedTransition:
    """One change of state, made at a safe point.

    Attributes:
        seed: Id of the seed.
        slot: Slot it sits in.
        from_state: State before.
        to_state: State after.
        step: Optimizer step of the safe point.
        epoch: Epoch it happened in.
        command_id: Command it belongs to.
        reason: Why, in words.
        replaced: Parameters that were fused or narrowed by this transition.
    """

    seed: str
    slot: str
    from_state: SeedState
    to_state: SeedState
    step: int
    epoch: int
    command_id: str
    reason: str
    replaced: tuple[Replacement, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ParameterGroup:
    """Parameters that share an owner and a birth, for the optimizer.

    Attributes:
        name: ``host``, or the id of the seed that owns them.
        birth_step: Step at which they entered the network; 0 for the host.
        parameters: In an order that is the same after a restore.
        trainable: ``False`` while the seed is frozen.
    """

    name: str
    birth_step: int
    parameters: tuple[Parameter, ...]
    trainable: bool = True
