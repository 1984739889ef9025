"""Small hosts and the kernels for them, made by the real parts, for tests of the growth engine."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.blueprints import families
from services.blueprints.artifact import Characterization, Kernel, Manifest
from services.blueprints.builder.branches import build_branch
from services.blueprints.signature import interface_signature
from services.blueprints.spec import Blueprint, Interface, SlotKind
from services.chassis.config.schema import EvaluationConfig, GrowthConfig
from services.kasmina.engine import GrowthEngine
from services.kasmina.model import Contribution, SeedRecord, SeedTransition

torch.set_num_threads(1)

WIDEN = Blueprint("widen", {}, families.FAMILIES["widen"].initialization)
BRANCH = Blueprint(
    "residual_bottleneck",
    dict(families.FAMILIES["residual_bottleneck"].defaults),
    families.FAMILIES["residual_bottleneck"].initialization,
)


class PlainNet(nn.Module):
    """Groups of conv-(pool)-BN-GELU-conv-BN-GELU, global max pool, linear head x 0.5."""

    def __init__(self, widths: tuple[int, ...] = (4, 6)) -> None:
        super().__init__()
        groups: list[nn.Module] = []
        channels = 1
        for index, width in enumerate(widths):
            groups.append(
                nn.Sequential(
                    nn.Conv2d(channels, width, 3, padding=1, bias=False),
                    nn.MaxPool2d(2) if index == 0 else nn.Identity(),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                    nn.Conv2d(width, width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(width),
                    nn.GELU(),
                )
            )
            channels = width
        self.groups = nn.Sequential(*groups)
        self.head = nn.Linear(channels, 5)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.groups(images)
        logits: Tensor = self.head(features.amax((2, 3)))
        return logits * 0.5


class Block(nn.Module):
    """Residual block; a projection where the width changes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)
        self.short = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1)

    def forward(self, images: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(images)))
        out = self.bn2(self.conv2(out))
        out += self.short(images)
        return F.relu(out)


class ResidualNet(nn.Module):
    """Stem, two stages of residual blocks, flatten into a linear head (so the head reads 4 entries per channel)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.stage1 = nn.Sequential(Block(4, 4), Block(4, 4))
        self.stage2 = Block(4, 6)
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.head = nn.Linear(24, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stage2(self.stage1(F.relu(self.bn(self.stem(images)))))
        logits: Tensor = self.head(torch.flatten(self.pool(features), 1))
        return logits


class DepthwiseNet(nn.Module):
    """Expansion, depthwise, projection, with batch normalization; mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Conv2d(1, 6, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6)
        self.bn2 = nn.BatchNorm2d(6)
        self.project = nn.Conv2d(6, 4, 1)
        self.act = nn.ReLU6()
        self.head = nn.Linear(4, 5)

    def forward(self, images: Tensor) -> Tensor:
        out = self.act(self.bn1(self.expand(images)))
        out = self.act(self.bn2(self.depthwise(out)))
        logits: Tensor = self.head(self.project(out).mean((2, 3)))
        return logits


class Perceptron(nn.Module):
    """Two hidden layers with batch normalization between."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: attention and a perceptron on a residual stream."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(features)
        self.attention = nn.MultiheadAttention(features, 2, batch_first=True)
        self.norm2 = nn.LayerNorm(features)
        self.fc1 = nn.Linear(features, 2 * features)
        self.fc2 = nn.Linear(2 * features, features)

    def forward(self, tokens: Tensor) -> Tensor:
        normed = self.norm1(tokens)
        tokens = tokens + self.attention(normed, normed, normed, need_weights=False)[0]
        out: Tensor = tokens + self.fc2(F.gelu(self.fc1(self.norm2(tokens))))
        return out


class VisionTransformer(nn.Module):
    """Patches, position embedding, two blocks, mean over tokens."""

    def __init__(self, features: int = 8) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, features, 4, stride=4)
        self.position = nn.Parameter(torch.zeros(1, 4, features))
        self.blocks = nn.Sequential(EncoderBlock(features), EncoderBlock(features))
        self.norm = nn.LayerNorm(features)
        self.head = nn.Linear(features, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patch(images).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(tokens)).mean(1))
        return logits


def fresh(host: type[nn.Module], seed: int = 0) -> nn.Module:
    """A host with weights of its own, the global stream left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return host()


def images(count: int = 8, seed: int = 1) -> Tensor:
    """Random images [N, 1, 8, 8]."""
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def labels(count: int = 8, seed: int = 2) -> Tensor:
    """Random classes [N]."""
    return torch.randint(0, 5, (count,), generator=torch.Generator().manual_seed(seed))


def settings(**changes: object) -> GrowthConfig:
    """Short stages, evaluation in the epoch of the graft."""
    values: dict[str, object] = {
        "isolation_steps": 3,
        "blend_steps": 4,
        "stabilization_steps": 2,
        "fine_tuning_steps": 2,
        "embargo_epochs": 2,
        "evaluation": EvaluationConfig(min_epochs=0),
    }
    return GrowthConfig.model_validate(values | changes)


def engine_for(model: nn.Module, **changes: object) -> GrowthEngine:
    """An engine around a host of this file."""
    return GrowthEngine(model, images(2), run="test", settings=settings(**changes), outputs=5, seed=7)


def kernel_for(interface: Interface, size: int, blueprint: Blueprint | None = None, seed: int = 11) -> Kernel:
    """What Tezzeret would compile."""
    chosen = blueprint or (WIDEN if interface.kind is SlotKind.WIDTH else BRANCH)
    tensors = {}
    if chosen.family != "widen":
        branch = build_branch(chosen, interface, size, seed)
        tensors = {name: parameter.detach().numpy() for name, parameter in branch.named_parameters()}
    manifest = Manifest(chosen, interface, interface_signature(interface), size, seed, Characterization("cpu", 1))
    return Kernel(manifest, tensors)


def germinate(engine: GrowthEngine, slot: str, size: int, seed: str = "s1", *, step: int = 0) -> SeedRecord:
    """Choose the family that fits the slot."""
    blueprint = BRANCH if slot.startswith("span:") else WIDEN
    return engine.germinate(
        seed_id=seed,
        slot=slot,
        blueprint=blueprint.id,
        family=blueprint.family,
        size=size,
        command_id=f"c-{seed}",
        step=step,
        epoch=0,
    )


def graft(engine: GrowthEngine, slot: str, size: int, seed: str = "s1", *, step: int = 0) -> list[SeedTransition]:
    """Germinate and load."""
    kernel = kernel_for(engine.interface(slot), size)
    germinate(engine, slot, size, seed, step=step)
    return engine.load(seed, kernel, step=step, digest="00" * 32)


def worth(low: float = 1.0, high: float = 3.0) -> Contribution:
    """A contribution with this interval."""
    return Contribution((low + high) / 2, low, high, 0.95, 100)


@dataclass
class Loop:
    """A plain training loop with a torch optimizer that follows the engine's groups."""

    model: nn.Module
    engine: GrowthEngine | None = None
    step: int = 0

    def __post_init__(self) -> None:
        parameters = [{"params": list(self.model.parameters())}]
        self.optimizer = torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
        if self.engine is not None:
            self.sync(())

    def sync(self, transitions: Iterable[SeedTransition]) -> None:
        """Carry state over to fused parameters, then follow the groups."""
        assert self.engine is not None
        for transition in transitions:
            for replacement in transition.replaced:
                buffer = torch.zeros_like(replacement.new.detach())
                for part, where in replacement.parts:
                    old = self.optimizer.state.pop(part, {}).get("momentum_buffer")
                    if old is not None:
                        buffer[where] = old
                self.optimizer.state[replacement.new]["momentum_buffer"] = buffer
        groups = self.engine.parameter_groups()
        template = {k: v for k, v in self.optimizer.param_groups[0].items() if k != "params"}
        self.optimizer.param_groups = [{**template, "params": list(group.parameters)} for group in groups]

    def train(self, steps: int) -> list[SeedTransition]:
        """Optimizer steps on batches that depend on the step alone."""
        done: list[SeedTransition] = []
        self.model.train()
        for _ in range(steps):
            self.step += 1
            batch, targets = images(8, seed=100 + self.step), labels(8, seed=200 + self.step)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(batch), targets)
            own = None if self.engine is None else self.engine.auxiliary_loss(targets)
            torch.autograd.backward(loss if own is None else loss + own)
            self.optimizer.step()
            if self.engine is not None:
                moved = self.engine.tick(self.step)
                self.sync(moved)
                done += moved
        return done


@dataclass(frozen=True)
class Saved:
    """What a checkpoint holds: topology as JSON text, weights, optimizer state by group and position."""

    topology: str
    weights: dict[str, Tensor]
    momentum: list[list[Tensor | None]]
    step: int


def save(loop: Loop) -> Saved:
    """A checkpoint of a loop."""
    assert loop.engine is not None
    momentum = [
        [copy.deepcopy(loop.optimizer.state.get(parameter, {}).get("momentum_buffer")) for parameter in group["params"]]
        for group in loop.optimizer.param_groups
    ]
    return Saved(json.dumps(loop.engine.state()), snapshot(loop.model), momentum, loop.step)


def resume(saved: Saved, loop: Loop) -> Loop:
    """Bring a loop with an engine (fresh, or one that has grown otherwise) to a checkpoint."""
    assert loop.engine is not None
    loop.engine.restore(json.loads(saved.topology))
    loop.model.load_state_dict(saved.weights)
    loop.sync(())
    loop.optimizer.state.clear()
    for group, buffers in zip(loop.optimizer.param_groups, saved.momentum, strict=True):
        for parameter, buffer in zip(group["params"], buffers, strict=True):
            if buffer is not None:
                loop.optimizer.state[parameter]["momentum_buffer"] = buffer.clone()
    loop.step = saved.step
    return loop


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the state dict."""
    return copy.deepcopy(dict(model.state_dict()))


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Same names, same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
