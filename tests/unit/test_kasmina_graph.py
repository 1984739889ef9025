"""Which channels change together, which cannot grow and why, and what all of it costs."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.kasmina.graph import Analysis, analyze
from tests.support.growth import (
    Block,
    DepthwiseNet,
    Perceptron,
    PlainNet,
    ResidualNet,
    VisionTransformer,
    equal,
    fresh,
    images,
    snapshot,
)


def look(model: nn.Module, example: Tensor | None = None) -> Analysis:
    return analyze(model, images(3) if example is None else example)


class Forward(nn.Module):
    """conv1 -> something -> conv2 -> mean -> head; the something is given."""

    def __init__(self, between: object) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)
        self.between = between if isinstance(between, nn.Module) else None
        self.function = between

    def forward(self, values: Tensor) -> Tensor:
        values = self.conv1(values)
        values = self.between(values) if self.between is not None else self.function(values)  # type: ignore[operator]  # a test's own function
        out: Tensor = self.head(self.conv2(values).mean((2, 3)))
        return out


class Flattened(nn.Module):
    """conv -> reshape -> linear -> linear; the reshape is given."""

    def __init__(self, reshape: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.fc = nn.Linear(256, 6)
        self.head = nn.Linear(6, 5)
        self.reshape = reshape

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.head(self.fc(self.reshape(self.conv(values))))  # type: ignore[operator]  # a test's own function
        return out


def test_a_residual_stream_is_one_slot_with_all_that_write_follow_and_read_it() -> None:
    found = look(ResidualNet())
    stream = found.slots["stem"]
    assert stream.writers == ("stem", "stage1.0.conv2", "stage1.1.conv2")
    assert stream.followers == ("bn", "stage1.0.bn2", "stage1.1.bn2")
    assert stream.readers == ("stage1.0.conv1", "stage1.1.conv1", "stage2.conv1", "stage2.short")
    assert found.slots["stage2.conv2"].writers == ("stage2.conv2", "stage2.short")
    assert found.sites["head"].inputs[0].factor == 4
    assert found.refused == {"head": "its channels are the model's output"}


def test_a_depthwise_layer_belongs_with_its_expansion_and_projection() -> None:
    found = look(DepthwiseNet())
    assert found.slots["expand"].followers == ("bn1", "depthwise", "bn2")
    assert found.slots["expand"].readers == ("project",)
    assert found.sites["depthwise"].operation == "depthwise_conv2d"


def test_a_transformer_grows_in_its_perceptrons_and_its_stream_is_refused() -> None:
    found = look(VisionTransformer())
    assert list(found.slots) == ["blocks.0.fc1", "blocks.1.fc1"]
    assert set(found.refused) == {"patch", "head"}


@pytest.mark.parametrize("host", [PlainNet, ResidualNet, DepthwiseNet, Perceptron, VisionTransformer])
def test_costs_add_up_to_the_parameters_and_the_host_is_left_as_it_was(host: type[nn.Module]) -> None:
    model = fresh(host)
    model.train()
    next(iter(model.children())).eval()
    before, flags = snapshot(model), [module.training for module in model.modules()]
    stream = torch.get_rng_state()
    found = look(model)
    assert equal(before, snapshot(model))
    assert flags == [module.training for module in model.modules()]
    assert torch.equal(stream, torch.get_rng_state())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    total = sum(cost.parameters * math.prod(found.slots[s].width for s in cost.slots) for cost in found.costs)
    assert total == sum(parameter.numel() for parameter in model.parameters())


def test_flops_are_two_per_multiply_add_and_two_per_normalized_element() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(256, 5))
    found = look(model)
    total = sum(cost.flops * math.prod(found.slots[s].width for s in cost.slots) for cost in found.costs)
    assert total == 2 * 64 * 9 * 4 + 2 * 4 * 64 + 2 * 256 * 5


def test_products_that_are_no_layers_are_billed_too() -> None:
    class Products(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.filters = nn.Parameter(torch.randn(3, 1, 2, 2))
            self.matrix = nn.Parameter(torch.randn(5, 3))

        def forward(self, values: Tensor) -> Tensor:
            maps = F.conv2d(values, self.filters, stride=2).flatten(2)
            mixed = torch.matmul(maps, maps.transpose(1, 2))
            attended = F.scaled_dot_product_attention(mixed, mixed, mixed)
            return F.linear(attended.mean(1), self.matrix)

    found = look(Products())
    products = 2 * 3 * 16 * 4 + 2 * 3 * 3 * 16 + 4 * 9 * 3 + 2 * 15
    assert sum(cost.flops for cost in found.costs) == products
    assert found.slots == {}


PASSES = [
    nn.ReLU(),
    nn.Dropout(0.5),
    nn.MaxPool2d(2),
    nn.BatchNorm2d(4),
    F.gelu,
    lambda x: F.max_pool2d(x, 2),
    lambda x: x + 1.0,
    lambda x: (2.0 * x).contiguous(),
    lambda x: x * torch.sigmoid(x),
    lambda x: x * x.mean((2, 3), keepdim=True),
    lambda x: x - x.amax(dim=(2, 3), keepdim=True),
    lambda x: x.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    lambda x: x.transpose(1, 2).transpose(1, 2),
    lambda x: x.flatten(2).unsqueeze(-1),
    lambda x: x * x.mean((2, 3))[:, :, None, None],
    lambda x: x.unsqueeze(1).squeeze(1),
    lambda x: x.view(x.size(0), x.size(1), -1, 8),
    lambda x: x.reshape(x.shape[0], x.shape[1], 8, 8),
]


@pytest.mark.parametrize("between", PASSES)
def test_what_treats_channels_one_by_one_lets_them_grow(between: object) -> None:
    found = look(Forward(between))
    assert "conv1" in found.slots, found.refused
    assert found.slots["conv1"].readers == ("conv2",)


REFUSED = [
    (nn.LayerNorm([4, 8, 8]), "LayerNorm: it normalizes over several dimensions"),
    (nn.GroupNorm(2, 4, affine=False), "GroupNorm without gain"),
    (nn.Softmax(1), "Softmax is not known"),
    (nn.Conv2d(4, 4, 1, groups=2), "grouped convolution"),
    (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "padding mode 'circular'"),
    (nn.BatchNorm2d(4, affine=False), "normalization without gain"),
    (lambda x: torch.cat([x[:, :2], x[:, 2:]], 1), "getitem"),
    (lambda x: x.softmax(1), "softmax"),
    (lambda x: x[..., :4], "getitem"),
    (lambda x: x + x[:, 0][:, None], "getitem"),
    (lambda x: x.view(x.size(0), 4, 8, 8), "fixed size"),
    (lambda x: x.reshape((-1, 4, 8, 8)), "fixed size"),
    (lambda x: x / math.sqrt(x.shape[1]), "computes with its width"),
    (lambda x: x / x.size(1), "computes with its width"),
    (lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1), "reduces over it"),
    (lambda x: x * x.sum(), "reduces over it"),
    (lambda x: x + torch.ones(4, 1, 1), "combines it with channels that cannot grow"),
    (lambda x: F.max_pool2d(x.transpose(1, 3), 1).transpose(1, 3), "pools over it"),
    (lambda x: x.view(x.size(0), 2, 2, 8, 8).flatten(1, 2), "splits or mixes it"),
    (lambda x: torch.stack(x.chunk(2, 1), 1).flatten(1, 2), "chunk"),
]


@pytest.mark.parametrize(("between", "reason"), REFUSED)
def test_what_mixes_or_fixes_channels_is_refused_alone_with_its_reason(between: object, reason: str) -> None:
    found = look(Forward(between))
    assert reason in found.refused["conv1"]
    assert "conv2" in found.slots


class Tokens(nn.Module):
    """linear -> something on [N, 8, 6] -> linear; the something is given."""

    def __init__(self, between: object) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(8, 6), nn.Linear(6, 5)
        self.other, self.third = nn.Linear(8, 6), nn.Linear(8, 6)
        self.between = between
        self.bias = nn.Parameter(torch.zeros(6, 6))

    def forward(self, images: Tensor) -> Tensor:
        values = images[:, 0]
        out: Tensor = self.head(self.between(self, values, self.embed(values))).mean(1)  # type: ignore[operator]  # as given
        return out


def heads(values: Tensor) -> Tensor:
    return values.view(values.shape[0], values.shape[1], -1, 3).transpose(1, 2)


def joined(values: Tensor) -> Tensor:
    return values.transpose(1, 2).flatten(2)


TOKENS = [
    lambda net, _, x: joined(F.scaled_dot_product_attention(heads(x), heads(x), heads(x))),
    lambda net, x, y: joined(F.scaled_dot_product_attention(heads(y), heads(net.other(x)), heads(y), is_causal=True)),
    lambda net, x, y: joined(F.scaled_dot_product_attention(heads(y), heads(y), heads(y), torch.zeros(8, 8))),
    lambda net, _, y: joined(torch.softmax(heads(y), -1)),
    lambda net, _, y: y.view(y.shape[0], y.shape[1], -1, 3).flatten(2),
    lambda net, _, y: y.view(y.size()),
    lambda net, _, y: y.reshape(y.shape),
    lambda net, _, y: F.log_softmax(y, 1),
    lambda net, _, y: nn.functional.gelu(y) + net.bias[0],
    lambda net, _, y: (y.transpose(1, 2) @ torch.ones(8, 8)).transpose(1, 2),
    lambda net, x, y: torch.cat([y, net.other(x)], dim=1),
    lambda net, x, y: torch.cat(tensors=[y, net.other(x)], dim=-2),
]


@pytest.mark.parametrize("between", TOKENS)
def test_tokens_heads_and_sums_with_parameters_let_features_grow(between: object) -> None:
    found = look(Tokens(between))
    assert "embed" in found.slots, found.refused


MIXED = [
    (
        lambda net, _, y: joined(y.view(y.shape[0], y.shape[1], 2, 3).transpose(1, 2)),
        "view(batch, tokens, -1, head_dim)",
    ),
    (lambda net, _, y: y.view(y.shape[0], y.shape[1], 3, -1).flatten(2), "view(batch, tokens, -1, head_dim)"),
    (lambda net, x, y: net.other(x).view(y.shape[0], y.shape[1], -1, 3).reshape(y.shape), "size of something else"),
    (lambda net, x, y: net.other(x).view(y.shape[0], y.shape[1], y.shape[2]), "size of something else"),
    (lambda net, _, y: F.scaled_dot_product_attention(y, y, y), "heads come before tokens"),
    (lambda net, x, y: (y @ net.other(x).transpose(1, 2)) @ net.third(x), "sums over it"),
    (lambda net, _, y: y @ net.bias, "sums over it"),
    (lambda net, _, y: torch.matmul(y, torch.ones(6)).unsqueeze(-1).expand(-1, -1, 6), "matmul"),
    (lambda net, _, y: y.softmax(dim=-1), "normalizes over it"),
    (lambda net, _, y: torch.softmax(y, -1), "normalizes over it"),
    (lambda net, _, y: y / net.bias[0], "divides by"),
    (lambda net, x, y: torch.stack([y, net.other(x)], 1).sum(1), "stack"),
    (lambda net, _, y: torch.cat(y.chunk(2, -1), -1), "write a layer for each part"),
]


@pytest.mark.parametrize(("between", "reason"), MIXED)
def test_what_mixes_features_is_refused_with_a_way_out(between: object, reason: str) -> None:
    assert reason in look(Tokens(between)).refused["embed"]


LAYERS: list[tuple[nn.Module, str]] = [
    (nn.LSTM(6, 6, batch_first=True), "gates share one matrix"),
    (nn.MultiheadAttention(6, 2), "write query, key, value and output as linear layers"),
    (nn.TransformerEncoderLayer(6, 2, 8, batch_first=True), "write the block with linear layers"),
    (nn.ConvTranspose1d(8, 8, 1), "use nn.Upsample"),
    (nn.PReLU(8), "PReLU is not known"),
    (nn.RMSNorm(6, elementwise_affine=False), "RMSNorm without gain"),
    (nn.BatchNorm1d(8), "normalizes over it"),
]


@pytest.mark.parametrize(("layer", "reason"), LAYERS)
def test_layers_that_are_not_widened_say_what_to_write_instead(layer: nn.Module, reason: str) -> None:
    class Holds(Tokens):
        def __init__(self) -> None:
            super().__init__(None)
            self.layer = layer

        def forward(self, images: Tensor) -> Tensor:
            values = self.embed(images[:, 0])
            if isinstance(self.layer, nn.MultiheadAttention):
                values = self.layer(values, values, values)[0]
            elif isinstance(self.layer, nn.LSTM):
                values = self.layer(values)[0]
            else:
                values = self.layer(values)
            out: Tensor = self.head(values).mean(1)
            return out

    assert reason in look(Holds()).refused["embed"]


def test_parameters_that_would_grow_in_two_dimensions_or_are_shared_are_refused() -> None:
    class Both(Tokens):
        def __init__(self) -> None:
            super().__init__(None)
            self.last = nn.Linear(6, 5)

        def forward(self, images: Tensor) -> Tensor:
            rows, columns = self.embed(images[:, 0, 0])[:, :, None], self.other(images[:, 0, 0])[:, None]
            grid = rows * columns if self.between else rows + columns + self.bias
            out: Tensor = self.last(self.head(grid).transpose(1, 2)).mean(1)
            return out

    found = look(Both())
    assert "bias would grow in two dimensions" in found.refused["embed"]
    assert "bias would grow in two dimensions" in found.refused["other"]
    free = Both()
    free.between = True
    # A layer that is applied at positions which grow costs a multiple of them.
    found = look(free)
    assert {frozenset(cost.slots) for cost in found.costs if cost.flops} >= {frozenset({"embed", "other"})}
    shared = Tokens(lambda net, _, y: y + net.bias[0])
    shared.again = shared.bias
    assert "bias" in look(shared).refused["embed"]


def test_parameters_that_layers_do_not_write_stay_as_they_are() -> None:
    class Queries(Tokens):
        def forward(self, images: Tensor) -> Tensor:
            out: Tensor = self.head(self.bias)[None].mean(1) + self.head(self.embed(images[:, 0])).mean(1)
            return out

    found = look(Queries(None))
    assert "bias" not in found.sites
    assert not found.slots


@pytest.mark.parametrize(
    "reshape",
    [nn.Flatten(), lambda x: torch.flatten(x, 1), lambda x: x.view(x.size(0), -1), lambda x: x.reshape(len(x), -1)],
)
def test_a_linear_layer_behind_a_flatten_reads_each_channel_at_all_its_positions(reshape: object) -> None:
    try:
        found = look(Flattened(reshape))
    except TypeError:
        pytest.fail("analysis raised")
    if "conv" in found.slots:
        assert found.sites["fc"].inputs[0].factor == 64
    else:
        assert "cannot be traced" in found.refused[""]


@pytest.mark.parametrize(
    ("reshape", "reason"),
    [
        (lambda x: x.view(-1, 256), "fixed size"),
        (lambda x: x.permute(0, 2, 3, 1).flatten(1), "splits or mixes it"),
        (
            lambda x: F.adaptive_avg_pool2d(x, 8).flatten(1).unsqueeze(1).squeeze(1) + x.sum((1, 2, 3))[:, None],
            "reduces",
        ),
    ],
)
def test_other_orders_behind_a_flatten_are_refused(reshape: object, reason: str) -> None:
    assert reason in look(Flattened(reshape)).refused["conv"]


def test_batch_normalization_and_convolution_behind_a_flatten_take_each_channel_at_all_its_positions() -> None:
    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)
            self.norm = nn.BatchNorm1d(128)
            self.again = nn.Conv2d(128, 3, 1)
            self.head = nn.Linear(3, 5)

        def forward(self, values: Tensor) -> Tensor:
            flat = self.norm(self.conv(values).flatten(1))
            out: Tensor = self.head(self.again(flat[:, :, None, None]).flatten(1))
            return out

    found = look(Behind())
    assert found.sites["norm"].outputs[0].factor == 64
    assert found.sites["again"].inputs[0].factor == 64


def test_a_module_used_twice_or_sharing_weights_or_with_hooks_is_refused() -> None:
    twice = nn.Conv2d(4, 4, 1)

    class Twice(Forward):
        def forward(self, values: Tensor) -> Tensor:
            values = self.conv1(values)
            out: Tensor = self.head(self.conv2(twice_of(self)(F.relu(twice_of(self)(values)))).mean((2, 3)))
            return out

    def twice_of(model: nn.Module) -> nn.Module:
        return model.get_submodule("between")

    assert "used at several places" in look(Twice(twice)).refused["conv1"]

    tied = Forward(nn.Conv2d(4, 4, 1))
    extra = nn.Conv2d(4, 4, 1)
    extra.weight = tied.get_submodule("between").weight  # type: ignore[assignment]  # tied on purpose
    tied.between = nn.Sequential(tied.between, nn.ReLU(), extra)  # type: ignore[arg-type]  # a module, as made above
    assert "shares its weights" in look(tied).refused["conv1"]

    hooked = Forward(nn.ReLU())
    hooked.conv1.register_forward_hook(lambda *_: None)
    assert "forward hooks" in look(hooked).refused["conv1"]


def test_groups_over_a_concatenation_are_refused() -> None:
    class Joined(Forward):
        def __init__(self) -> None:
            super().__init__(nn.GroupNorm(2, 8))
            self.conv2 = nn.Conv2d(8, 6, 3, padding=1)

        def forward(self, values: Tensor) -> Tensor:
            wide = self.conv1(values)
            out: Tensor = self.head(self.conv2(self.get_submodule("between")(torch.cat([wide, -wide], 1))).mean((2, 3)))
            return out

    assert "would move over a concatenation" in look(Joined()).refused["conv1"]


def test_weights_that_the_code_reads_itself_are_refused() -> None:
    class Reads(Forward):
        def forward(self, values: Tensor) -> Tensor:
            out: Tensor = super().forward(values)
            return out + self.conv2.weight.sum()

    found = look(Reads(nn.ReLU()))
    assert "reads the weights of conv2" in found.refused["conv1"]


def test_what_nothing_reads_is_refused() -> None:
    class Dead(Forward):
        def forward(self, values: Tensor) -> Tensor:
            self.conv2(F.relu(self.conv1(values)))
            out: Tensor = self.head(values.mean((2, 3)).expand(-1, 6))
            return out

    assert look(Dead(nn.ReLU())).refused["conv2"] == "nothing that can be widened reads its channels"


def test_sums_of_different_layouts_are_refused() -> None:
    class Layouts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 2, 3, padding=1)
            self.other = nn.Linear(64, 128)
            self.head = nn.Linear(128, 5)

        def forward(self, values: Tensor) -> Tensor:
            out: Tensor = self.head(self.conv(values).flatten(1) + self.other(values.flatten(1)))
            return out

    assert "different layouts" in look(Layouts()).refused["conv"]


class Branching(nn.Module):
    """Cannot be traced: its path depends on the data."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, values: Tensor) -> Tensor:
        out: Tensor = self.conv(values)
        return out if out.sum() > 0 else -out


def test_an_untraceable_module_is_refused_alone_and_can_still_be_bridged() -> None:
    found = look(Forward(Branching()))
    assert "cannot be traced" in found.refused["between"]
    assert "cannot be traced" in found.refused["conv1"]
    assert "conv2" in found.slots
    assert "span:between" in found.spans


def test_an_untraceable_network_grows_only_inside_modules_that_can_be_traced_and_keeps_its_spans_and_costs() -> None:
    class Whole(Forward):
        def forward(self, values: Tensor) -> Tensor:
            if values.sum() > 1e9:
                return values
            return super().forward(values)

    found = look(Whole(Block(4, 4)))
    assert list(found.slots) == ["between.conv1"]
    assert found.refused["between.conv2"] == "add combines it with channels that cannot grow"
    assert "cannot be traced" in found.refused[""]
    assert list(found.spans) == ["span:between"]
    total = sum(cost.parameters * math.prod(found.slots[s].width for s in cost.slots) for cost in found.costs)
    assert total == sum(parameter.numel() for parameter in Whole(Block(4, 4)).parameters())


def test_tracing_leaves_nothing_on_the_host() -> None:
    model = Forward(lambda x: x + torch.ones(1))
    attributes = set(model.__dict__)
    assert "conv1" in look(model).slots
    assert set(model.__dict__) == attributes


def test_a_forward_that_differs_between_training_and_evaluation_is_refused() -> None:
    class Auxiliary(Forward):
        def forward(self, values: Tensor) -> Tensor:
            out: Tensor = super().forward(values)
            return out + self.head(values.flatten(1)[:, :6]) if self.training else out

    class Failing(Forward):
        def forward(self, values: Tensor) -> Tensor:
            if self.training and values.sum() > 0:
                return values
            return super().forward(values)

    for model in (Auxiliary(nn.ReLU()), Failing(nn.ReLU())):
        model.eval()
        found = look(model)
        assert found.slots == {}
        assert found.refused == {"": "its forward does other things in training than in evaluation"}
        assert not any(module.training for module in model.modules())
    dropout = Forward(lambda x: F.dropout(x, 0.5))
    assert "conv1" in look(dropout).slots


def test_spans_are_modules_that_hold_layers_and_map_one_tensor_to_one() -> None:
    assert list(look(ResidualNet()).spans)[-3:] == ["span:stage1.0", "span:stage1.1", "span:stage2"]
    spans = look(PlainNet()).spans
    assert list(spans) == ["span:groups.0", "span:groups.1"]
    assert spans["span:groups.0"].input_shape == (1, 8, 8)
    assert spans["span:groups.0"].output_shape == (4, 4, 4)
    assert list(look(VisionTransformer()).spans) == ["span:blocks.0", "span:blocks.1"]
