"""Rebuilds a grown network from an instance of the class it began as. Stands alone: needs torch and nothing else.

A copy of this file is part of every export, beside ``growth.json`` (what changed: layer, from, to) and
``weights.safetensors``::

    import torch, rebuild
    model = rebuild.load(MyNetwork(), "export")

Format of the weights: https://github.com/huggingface/safetensors#format
"""

import json
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class MeanPool(nn.Module):
    """The mean over some dimensions, which stay with one entry."""

    def __init__(self, *dimensions: int) -> None:
        super().__init__()
        self.dimensions = dimensions

    def forward(self, values: Tensor) -> Tensor:
        """Shape as before, 1 in the dimensions."""
        return values.mean(self.dimensions, keepdim=True)


class Attention(nn.Module):
    """Self-attention over positions: [N, 3 S, H, W] to [N, S, H, W], or [N, T, 3 S] to [N, T, S]."""

    def __init__(self, heads: int, *, spatial: bool) -> None:
        super().__init__()
        self.heads = heads
        self.spatial = spatial

    def forward(self, values: Tensor) -> Tensor:
        """Queries, keys and values in, their mixture out."""
        tokens = values.flatten(2).transpose(1, 2) if self.spatial else values
        split: Tensor = torch.unflatten(tokens, 2, (3, self.heads, -1))
        parts = split.permute(2, 0, 3, 1, 4)
        queries, keys, content = parts[0], parts[1], parts[2]
        scores = queries @ keys.transpose(-1, -2) * queries.shape[-1] ** -0.5
        mixed: Tensor = (scores.softmax(-1) @ content).transpose(1, 2).flatten(2)
        if self.spatial:
            mixed = mixed.transpose(1, 2).reshape(values.shape[0], -1, values.shape[2], values.shape[3])
        return mixed


class Gate(nn.Module):
    """What entered the branch times tanh of what arrives here."""

    def forward(self, values: Tensor, entered: Tensor) -> Tensor:
        """Shape of ``entered``; ``values`` may have one position only."""
        return entered * values.tanh()


class Difference(nn.Module):
    """What arrives here minus what entered the branch."""

    def forward(self, values: Tensor, entered: Tensor) -> Tensor:
        """Shape of both."""
        return values - entered


class Branch(nn.Sequential):
    """The layers of a branch, first to last."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Through all layers."""
        values = inputs
        for layer in self:
            values = layer(values, inputs) if isinstance(layer, (Gate, Difference)) else layer(values)
        return values


_PLAIN: "dict[str, Callable[[Mapping[str, Any]], nn.Module]]" = {
    "relu": lambda _: nn.ReLU(),
    "gelu": lambda _: nn.GELU(),
    "silu": lambda _: nn.SiLU(),
    "tanh": lambda _: nn.Tanh(),
    "flatten": lambda _: nn.Flatten(),
    "mean_pool1d": lambda _: MeanPool(1),
    "mean_pool2d": lambda _: MeanPool(2, 3),
    "max_pool2d": lambda spec: nn.MaxPool2d(spec["kernel_size"]),
    "attention1d": lambda spec: Attention(spec["heads"], spatial=False),
    "attention2d": lambda spec: Attention(spec["heads"], spatial=True),
    "gate": lambda _: Gate(),
    "difference": lambda _: Difference(),
}


class Bridge(nn.Module):
    """``host`` with a branch beside it that reads what enters it (or what leaves it); their outputs are added.

    Where the span became wider than the branch, the branch reads the first ``reads`` channels and writes the first
    ``channels``.
    """

    def __init__(
        self, host: nn.Module, branch: nn.Module, *, reads: int, channels: int, spatial: bool, source: str
    ) -> None:
        super().__init__()
        self.host = host
        self.branch = branch
        self.reads = reads
        self.channels = channels
        self.spatial = spatial
        self.source = source

    def forward(self, inputs: Tensor) -> Tensor:
        """Shapes are those of ``host``."""
        outputs: Tensor = self.host(inputs)
        axis = 1 if self.spatial else inputs.dim() - 1
        seen = outputs if self.source == "output" else inputs
        added: Tensor = self.branch(seen.narrow(axis, 0, self.reads))
        rest = outputs.shape[axis] - self.channels
        own = outputs.narrow(axis, 0, self.channels) + added
        return torch.cat([own, outputs.narrow(axis, self.channels, rest)], axis) if rest else own


def grow(model: nn.Module, changes: Sequence[Mapping[str, Any]]) -> nn.Module:
    """``model`` with its layers replaced by new ones of the shapes in ``changes``, freshly initialized, in place.

    Each change has ``path``, ``operation``, ``before_shape`` and ``after_shape`` (of the weight); a branch has its
    ``layers`` instead and comes after the layers it spans.
    Raises ValueError for a layer that is not there or does not look as it did before growth.
    """
    for change in changes:
        if change["operation"] == "parameter":
            _widen_parameter(model, change)
            continue
        try:
            layer = model.get_submodule(change["path"])
        except AttributeError as error:
            raise ValueError(f"the network has no layer {change['path']}") from error
        new = _bridged(layer, change) if change.get("layers") else _widened(layer, change)
        _replace(model, change["path"], new)
    return model


def load(model: nn.Module, folder: "str | Path") -> nn.Module:
    """``model``, an instance of the host's class, grown in place and with the exported weights, in evaluation mode.

    Raises ValueError when ``model`` is not what the growth began with, RuntimeError when the weights do not fit.
    """
    folder = Path(folder)
    grow(model, json.loads((folder / "growth.json").read_text(encoding="utf-8"))["changes"])
    model.load_state_dict(read_safetensors(folder / "weights.safetensors"))
    return model.eval()


def read_safetensors(path: "str | Path") -> "dict[str, Tensor]":
    """The tensors of a safetensors file by name."""
    data = bytearray(Path(path).read_bytes())
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    start = 8 + length
    tensors: dict[str, Tensor] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        first, last = entry["data_offsets"]
        if first == last:
            tensors[name] = torch.zeros(entry["shape"], dtype=_DTYPES[entry["dtype"]])
            continue
        content = bytearray(data[start + first : start + last])
        tensors[name] = torch.frombuffer(content, dtype=_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def _replace(model: nn.Module, path: str, layer: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, layer)


def _bridged(layer: nn.Module, change: Mapping[str, Any]) -> nn.Module:
    branch = Branch()
    for spec in change["layers"]:
        branch.add_module(spec["name"], _branch_layer(spec))
    reference = next(layer.parameters())
    branch.to(reference.device, reference.dtype)
    reads, _, channels = change["after_shape"]
    return Bridge(
        layer, branch, reads=reads, channels=channels, spatial=change["spatial"], source=change["source"]
    ).train(layer.training)


def _branch_layer(spec: Mapping[str, Any]) -> nn.Module:
    operation, inputs, outputs = spec["operation"], spec["inputs"], spec["outputs"]
    if operation in ("conv2d", "depthwise_conv2d"):
        side, groups = spec["kernel_size"], inputs if operation == "depthwise_conv2d" else 1
        return nn.Conv2d(inputs, outputs, side, spec["stride"], side // 2, groups=groups, bias=spec["bias"])
    if operation == "linear":
        return nn.Linear(inputs, outputs, bias=spec["bias"])
    normalizations: dict[str, Callable[[int], nn.Module]] = {
        "batch_norm1d": nn.BatchNorm1d,
        "batch_norm2d": nn.BatchNorm2d,
        "layer_norm": nn.LayerNorm,
        "group_norm": lambda channels: nn.GroupNorm(1, channels),
    }
    return normalizations[operation](outputs) if operation in normalizations else _PLAIN[operation](spec)


def _widen_parameter(model: nn.Module, change: Mapping[str, Any]) -> None:
    owner, _, name = change["path"].rpartition(".")
    try:
        parent = model.get_submodule(owner)
    except AttributeError as error:
        raise ValueError(f"the network has no parameter {change['path']}") from error
    old = _check(change, parent._parameters.get(name))
    like = old.detach().float()
    fresh = like.mean() + like.std(correction=0) * torch.randn(tuple(change["after_shape"]), device=old.device)
    setattr(parent, name, nn.Parameter(fresh.to(old.dtype), old.requires_grad))


def _check(change: Mapping[str, Any], weight: "Tensor | None") -> Tensor:
    before = tuple(change["before_shape"])
    if weight is None or tuple(weight.shape) != before:
        found = "no weight" if weight is None else tuple(weight.shape)
        raise ValueError(f"{change['path']}: growth began with a weight of {before}, this network has {found}")
    return weight


def _widened(layer: nn.Module, change: Mapping[str, Any]) -> nn.Module:
    before, after = tuple(change["before_shape"]), tuple(change["after_shape"])
    weight = _check(change, layer._parameters.get("weight"))
    new: nn.Module
    if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        # A depthwise layer keeps one input channel per group, and as many filters for each.
        groups = after[0] * layer.groups // before[0] if layer.groups > 1 else 1
        new = type(layer)(
            after[1] * groups,
            after[0],
            layer.kernel_size,  # type: ignore[arg-type]  # a tuple of the class's own dimensions
            stride=layer.stride,  # type: ignore[arg-type]  # as above
            padding=layer.padding,  # type: ignore[arg-type]  # as above
            dilation=layer.dilation,  # type: ignore[arg-type]  # as above
            groups=groups,
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
        )
    elif isinstance(layer, nn.Linear):
        new = nn.Linear(after[1], after[0], bias=layer.bias is not None)
    elif isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
        new = type(layer)(after[0], eps=layer.eps, momentum=layer.momentum)
    elif isinstance(layer, nn.LayerNorm):
        new = nn.LayerNorm(list(after), eps=layer.eps, bias=layer.bias is not None)
    elif isinstance(layer, nn.RMSNorm):
        new = nn.RMSNorm(list(after), eps=layer.eps)
    elif isinstance(layer, nn.GroupNorm):
        groups = after[0] * layer.num_groups // before[0] if layer.num_groups > 1 else 1
        new = nn.GroupNorm(groups, after[0], eps=layer.eps)
    else:
        raise ValueError(  # noqa: TRY004 - the table asks for it: its value is wrong
            f"{change['path']}: a {type(layer).__name__} cannot be widened by this version"
        )
    return new.to(weight.device, weight.dtype).train(layer.training)
