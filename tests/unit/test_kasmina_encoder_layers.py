"""torch's own transformer blocks: their feed-forward grows, whatever path their forward takes."""

from __future__ import annotations

import copy
import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.kasmina.graph import analyze, with_named_layers
from services.kasmina.topology import GrowingNetwork
from services.kasmina.widening import Draw
from services.tolaria import rebuild
from tests.support.growth import engine_for, fresh, images
from tests.support.networks import EncoderStack, FusedProjection


class Block(nn.Module):
    """One block of torch's on the rows of an image."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(8, 2, 6, **{"batch_first": True, **settings})
        self.head = nn.Linear(8, 5)

    def forward(self, batch: Tensor) -> Tensor:
        rows = batch[:, 0]
        first = self.block.self_attn.batch_first
        out = self.block(rows) if first else self.block(rows.transpose(0, 1)).transpose(0, 1)
        logits: Tensor = self.head(out.mean(1))
        return logits


class Masked(nn.Module):
    """Cannot be traced, and calls a stack with a mask of padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 6, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 5)

    def forward(self, batch: Tensor) -> Tensor:
        rows = batch[:, 0]
        if len(rows) == 0:
            raise ValueError("no rows")
        padded = torch.zeros(rows.shape[:2], dtype=torch.bool)
        padded[:, 6:] = True
        logits: Tensor = self.head(self.encoder(rows, src_key_padding_mask=padded)[:, 0])
        return logits


def slow(model: nn.Module, batch: Tensor) -> Tensor:
    """The output without torch's fused kernels."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            result: Tensor = model(batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    return result


def learned(model: nn.Module) -> tuple[Tensor, dict[int, Tensor]]:
    """Output of a training step, and the gradients by the identity of the Parameters, whose names move."""
    model.zero_grad()
    out = model.train()(images())
    out.square().sum().backward()
    return out.detach(), {id(p): p.grad.clone() for p in model.parameters() if p.grad is not None}


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", nn.GELU(), F.silu])
@pytest.mark.parametrize("more", [{}, {"bias": False}, {"batch_first": False}])
def test_a_block_is_unchanged_at_birth_in_training_and_on_the_fused_path(
    norm_first: bool, activation: Any, more: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    model = Block(norm_first=norm_first, activation=activation, dropout=0.0, **more)
    batch = images()
    trained, gradients = learned(model)
    with torch.no_grad():
        evaluated = model.eval()(batch)
    plain = [id(parameter) for parameter in model.parameters()]
    network = GrowingNetwork(model, analyze(model, batch))
    assert list(network.analysis.slots) == ["block.linear1"]
    network.widen("s", "block.linear1", 3, Draw(torch.Generator().manual_seed(1)))
    out, grown = learned(model)
    assert torch.allclose(out, trained, rtol=1e-5, atol=1e-6)
    for key in plain:
        assert torch.allclose(grown[key], gradients[key], rtol=1e-4, atol=1e-5)
    model.eval()
    with torch.no_grad():
        assert torch.allclose(model(batch), evaluated, rtol=1e-5, atol=1e-6)
        # A reader that is no longer zero shows that the fused path computes with the newborn weights.
        for parameter in network.parameters_of("s"):
            parameter.normal_()
        assert torch.allclose(model(batch), slow(model, batch), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(batch), evaluated, atol=1e-3)
        with network.without(["s"]):
            assert torch.equal(model(batch), evaluated)


def test_newborn_features_pass_the_dropout_of_the_block() -> None:
    torch.manual_seed(0)
    model = Block(dropout=0.5)
    network = GrowingNetwork(model, analyze(model, images()))
    network.widen("s", "block.linear1", 3, Draw(torch.Generator().manual_seed(1)))
    model.train()
    seen: list[Tensor] = []
    model.block.linear2.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model(images())
    assert seen[0].shape[-1] == 9
    dropped = float((seen[0] == 0).float().mean())
    model.block.dropout.p = 0.0
    model(images())
    assert dropped > float((seen[1] == 0).float().mean()) + 0.1


def test_a_stack_in_code_that_cannot_be_traced_grows_by_module_paths() -> None:
    torch.manual_seed(0)
    model, batch = Masked().eval(), images()
    with torch.no_grad():
        before = model(batch)
    network = GrowingNetwork(model, analyze(model, batch))
    assert list(network.analysis.slots) == ["encoder.layers.0.linear1", "encoder.layers.1.linear1"]
    assert "cannot be traced" in network.analysis.refused[""]
    assert "fixes their number" in network.analysis.refused["encoder.layers.0.linear2"]
    for number, slot in enumerate(network.analysis.slots):
        network.widen(f"s{number}", slot, 2, Draw(torch.Generator().manual_seed(number)))
    with torch.no_grad():
        assert torch.allclose(model(batch), before, atol=1e-5)
    assert torch.allclose(model(batch).detach(), before, atol=1e-5)
    engine = engine_for(Masked())
    report = engine.measure_health([images(engine.health_samples_needed())])
    assert all(health.effective_rank is not None for health in report.slots)
    assert torch.backends.mha.get_fastpath_enabled()


def test_a_block_after_fusing_is_the_class_of_torchs_that_rebuild_makes() -> None:
    model, batch = fresh(EncoderStack), images()
    network = GrowingNetwork(model, analyze(model, batch))
    network.widen("s", "last.linear1", 3, Draw(torch.Generator().manual_seed(1)))
    network.absorb("s")
    assert type(model.get_submodule("last.linear1")) is type(model.get_submodule("last.linear2")) is nn.Linear
    table = [
        {"path": c.path, "operation": c.operation, "before_shape": c.before_shape, "after_shape": c.after_shape}
        for c in network.changes()
    ]
    rebuilt = rebuild.grow(fresh(EncoderStack, seed=5), json.loads(json.dumps(table)))
    rebuilt.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(rebuilt.eval()(batch), model.eval()(batch))


@pytest.mark.parametrize("batch_first", [True, False])
def test_flops_of_a_block_are_those_of_its_formula(batch_first: bool) -> None:
    model = Block(batch_first=batch_first)
    found = analyze(model, images(2))
    total = sum(cost.flops * math.prod(found.slots[slot].width for slot in cost.slots) for cost in found.costs)
    tokens, features, hidden = 8, 8, 6
    attention = 8 * tokens * features**2 + 4 * tokens**2 * features
    perceptron, norms, head = 4 * tokens * features * hidden, 2 * 2 * tokens * features, 2 * features * 5
    assert total == attention + perceptron + norms + head


def test_an_unknown_activation_or_another_layer_keeps_the_feed_forward_as_it_is() -> None:
    mixing = Block(activation=lambda values: values.softmax(-1))
    found = analyze(mixing, images(2))
    assert "not known to treat channels one by one" in found.refused["block.linear1"]

    class Own(nn.Linear):
        """Might do anything."""

    replaced = Block()
    replaced.block.linear1 = Own(8, 6)
    assert "block.linear1" not in analyze(replaced, images(2)).slots


def test_no_branch_is_put_where_torchs_code_reads_what_stands_there() -> None:
    found = with_named_layers(analyze(fresh(EncoderStack), images(2)), ["span:*linear1", "span:head"])
    assert list(found.spans) == ["span:last"]


def test_around_a_joint_projection_the_perceptron_grows() -> None:
    found = analyze(fresh(FusedProjection), images(2))
    assert list(found.slots) == ["fc1"]
    assert "a number of parts that the code fixes cannot grow" in found.refused["qkv"]


def test_a_block_that_is_copied_while_grown_computes_the_same() -> None:
    model = Block(dropout=0.0)
    network = GrowingNetwork(model, analyze(model, images()))
    network.widen("s", "block.linear1", 3, Draw(torch.Generator().manual_seed(1)))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin.eval()(images()), model.eval()(images()))
