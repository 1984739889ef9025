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
_PLAIN = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "tanh": nn.Tanh, "flatten": nn.Flatten}


class Bridge(nn.Module):
    """``host`` with a branch beside it: both see the same input, the outputs are added.

    Where the span became wider than the branch, the branch reads and writes the first ``channels`` channels.
    """

    def __init__(self, host: nn.Module, branch: nn.Module, *, channels: int, spatial: bool) -> None:
        super().__init__()
        self.host = host
        self.branch = branch
        self.channels = channels
        self.spatial = spatial

    def forward(self, inputs: Tensor) -> Tensor:
        """Shapes are those of ``host``."""
        outputs: Tensor = self.host(inputs)
        axis = 1 if self.spatial else inputs.dim() - 1
        added: Tensor = self.branch(inputs.narrow(axis, 0, self.channels))
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
    branch = nn.Sequential()
    for spec in change["layers"]:
        branch.add_module(spec["name"], _branch_layer(spec))
    spatial = any(spec["operation"].endswith("2d") for spec in change["layers"])
    reference = next(layer.parameters())
    branch.to(reference.device, reference.dtype)
    return Bridge(layer, branch, channels=change["after_shape"][0], spatial=spatial).train(layer.training)


def _branch_layer(spec: Mapping[str, Any]) -> nn.Module:
    operation, inputs, outputs = spec["operation"], spec["inputs"], spec["outputs"]
    if operation in ("conv2d", "depthwise_conv2d"):
        side, groups = spec["kernel_size"], inputs if operation == "depthwise_conv2d" else 1
        return nn.Conv2d(inputs, outputs, side, padding=side // 2, groups=groups, bias=spec["bias"])
    if operation == "linear":
        return nn.Linear(inputs, outputs, bias=spec["bias"])
    normalizations: dict[str, Callable[[int], nn.Module]] = {
        "batch_norm1d": nn.BatchNorm1d,
        "batch_norm2d": nn.BatchNorm2d,
        "layer_norm": nn.LayerNorm,
        "group_norm": lambda channels: nn.GroupNorm(1, channels),
    }
    return normalizations[operation](outputs) if operation in normalizations else _PLAIN[operation]()


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
