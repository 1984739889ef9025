"""Where a network can grow: channel sets and spans, found without editing or training anything.

The host is traced by ``torch.fx`` and run once on a small batch. Every dimension that a convolution or
a linear layer writes gets a variable; variables that must stay equal (residual sums, normalizations,
depthwise layers) are united; what mixes or fixes channels in a way we do not know *pins* them, with the
reason. A set of channels that is written and read and not pinned is a WIDTH slot. A module that maps one
tensor to one tensor is a SPAN. The traced graph is thrown away: fx is for analysis only.
"""

from __future__ import annotations

import math
import operator
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from services.blueprints.vocabulary import Operation
from services.kasmina.model import SPAN_PREFIX

NORMALIZATIONS: Mapping[type[nn.Module], Operation] = {
    nn.BatchNorm1d: Operation.BATCH_NORM1D,
    nn.BatchNorm2d: Operation.BATCH_NORM2D,
}
_MULTIPLYING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
_NORMALIZING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm)

# Modules that treat each element, or each channel's positions, alone.
_POINTWISE_MODULES: frozenset[type[nn.Module]] = frozenset(
    {
        nn.Identity,
        nn.ReLU,
        nn.ReLU6,
        nn.LeakyReLU,
        nn.ELU,
        nn.CELU,
        nn.SELU,
        nn.GELU,
        nn.SiLU,
        nn.Mish,
        nn.Tanh,
        nn.Sigmoid,
        nn.Hardswish,
        nn.Hardsigmoid,
        nn.Hardtanh,
        nn.Softplus,
        nn.Softsign,
        nn.Dropout,
    }
)
_POOLING_MODULES: frozenset[type[nn.Module]] = frozenset(
    {
        nn.MaxPool1d,
        nn.MaxPool2d,
        nn.MaxPool3d,
        nn.AvgPool1d,
        nn.AvgPool2d,
        nn.AvgPool3d,
        nn.AdaptiveAvgPool1d,
        nn.AdaptiveAvgPool2d,
        nn.AdaptiveAvgPool3d,
        nn.AdaptiveMaxPool1d,
        nn.AdaptiveMaxPool2d,
        nn.AdaptiveMaxPool3d,
        nn.Dropout2d,
        nn.Upsample,
        nn.ZeroPad2d,
    }
)
_POINTWISE = frozenset(
    {
        "relu", "relu_", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "tanh", "sigmoid",
        "hardswish", "hardsigmoid", "hardtanh", "softplus", "dropout", "neg", "abs", "exp", "sqrt", "square",
        "clamp", "clamp_min", "clone", "contiguous", "detach", "float", "to", "type_as",
    }
)  # fmt: skip
_POOLING = frozenset(
    {
        "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
        "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "interpolate",
    }
)  # fmt: skip
_BINARY = frozenset(
    {"add", "iadd", "add_", "sub", "isub", "sub_", "mul", "imul", "mul_", "truediv", "itruediv", "div", "div_"}
)
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "logsumexp"})
_RESHAPES = frozenset({"flatten", "view", "reshape", "squeeze", "unsqueeze"})
_PRODUCTS = frozenset({"matmul", "bmm", "mm"})


@dataclass(frozen=True, slots=True)
class Axis:
    """Label of a dimension: ``factor`` consecutive entries for each channel of variable ``variable``."""

    variable: int
    factor: int = 1


Labels = tuple[Axis | None, ...]


@dataclass(frozen=True, slots=True)
class Site:
    """A layer that touches WIDTH slots.

    Attributes:
        path: Module path in the host.
        operation: What it does, of the closed vocabulary.
        out_slot: Slot of its output channels (of its only channels for a follower); ``None``: fixed.
        in_slot: Slot of its input channels; ``None``: fixed, or a follower.
        factor: Input entries per input channel (more than 1 behind a flatten).
    """

    path: str
    operation: Operation
    out_slot: str | None
    in_slot: str | None
    factor: int = 1


@dataclass(frozen=True, slots=True)
class WidthSlot:
    """Channels that must change together. Paths are in forward order."""

    name: str
    width: int
    writers: tuple[str, ...]
    followers: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SpanSlot:
    """A module that a branch can bridge, with the shapes of one sample that enter and leave it."""

    name: str
    path: str
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Cost:
    """Coefficients of one summand of the host's cost; see :class:`services.kasmina.model.CostTerm`."""

    flops: float
    parameters: float
    slots: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Analysis:
    """Everything known about where a host can grow, and what it costs.

    Attributes:
        slots: WIDTH slots in forward order, by name.
        spans: SPAN slots in forward order, by name.
        refused: Module path of what cannot grow, with the reason.
        sites: Layers of WIDTH slots, by module path.
        shapes: Shapes of one sample that enter and leave each module that ran once, by path.
        costs: Summands of the host's cost.
    """

    slots: Mapping[str, WidthSlot]
    spans: Mapping[str, SpanSlot]
    refused: Mapping[str, str]
    sites: Mapping[str, Site]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    costs: tuple[Cost, ...]


# ------------------------------------------------------------------ running without a trace


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random streams are as before afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            yield
    finally:
        for module, training in flags:
            module.training = training


@dataclass(slots=True)
class _Calls:
    """What one forward pass showed about each module, by path."""

    inputs: dict[str, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    count: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    last: set[str] = field(default_factory=set)


def _observe(model: nn.Module, example: Tensor) -> _Calls:
    """Run the host once and note what shapes pass through its modules."""
    calls = _Calls()
    results: dict[str, Tensor] = {}

    def note(path: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            calls.count[path] += 1
            if len(args) == 1 and isinstance(args[0], Tensor) and isinstance(output, Tensor):
                calls.inputs[path].append(tuple(args[0].shape))
                calls.outputs[path].append(tuple(output.shape))
                results[path] = output

        return hook

    handles = [module.register_forward_hook(note(path)) for path, module in model.named_modules() if path]
    try:
        final = model(example)
    finally:
        for handle in handles:
            handle.remove()
    calls.last = {path for path, output in results.items() if output is final}
    return calls


# ------------------------------------------------------------------ tracing


class _Tracer(fx.Tracer):
    """Traces into everything but torch's own layers and modules known to be opaque."""

    def __init__(self, opaque: frozenset[str]) -> None:
        super().__init__()
        self.opaque = opaque
        self.failed: str | None = None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.opaque or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            if self.failed is None:
                self.failed = self.path_of_module(m)
            raise


def _trace(model: nn.Module) -> tuple[fx.GraphModule | None, dict[str, str]]:
    """Trace the host; modules that cannot be traced become opaque leaves.

    Returns:
        The traced host (``None`` if its own forward cannot be traced) and path to reason of what could not.
    """
    opaque: dict[str, str] = {}
    while True:
        tracer = _Tracer(frozenset(opaque))
        try:
            graph = tracer.trace(model)
        except Exception as error:  # noqa: BLE001 - the host's forward is foreign code: whatever it raises, it cannot be traced
            reason = f"cannot be traced: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            if tracer.failed is None:
                return None, opaque | {"": reason}
            opaque[tracer.failed] = reason
            continue
        if not _trains_alike(model, graph, frozenset(opaque)):
            return None, opaque | {"": "its forward does other things in training than in evaluation"}
        return fx.GraphModule(model, graph), opaque


def _trains_alike(model: nn.Module, graph: fx.Graph, opaque: frozenset[str]) -> bool:
    """Whether the host calls the same layers and functions in training mode; it is in evaluation mode afterwards."""
    model.train()
    try:
        training = _Tracer(opaque).trace(model)
    except Exception:  # noqa: BLE001 - foreign code again: it traced in evaluation mode and does not in training mode
        return False
    finally:
        model.eval()

    def calls(traced: fx.Graph) -> list[tuple[str, str, int]]:
        # Tensors that the code makes are numbered as they come, over both traces.
        names = [(node, re.sub(r"^_tensor_constant\d+$", "constant", str(node.target))) for node in traced.nodes]
        return [(node.op, name, len(node.all_input_nodes)) for node, name in names]

    return calls(training) == calls(graph)


# ------------------------------------------------------------------ channel variables


class _Channels:
    """Union-find over channel variables, with the reason that pins a set."""

    def __init__(self) -> None:
        self._parent: list[int] = []
        self._pins: dict[int, str] = {}

    def new(self) -> Axis:
        self._parent.append(len(self._parent))
        return Axis(len(self._parent) - 1)

    def find(self, variable: int) -> int:
        while self._parent[variable] != variable:
            self._parent[variable] = self._parent[self._parent[variable]]
            variable = self._parent[variable]
        return variable

    def unite(self, one: int, other: int) -> None:
        low, high = sorted((self.find(one), self.find(other)))
        self._parent[high] = low
        if high in self._pins:
            self._pins.setdefault(low, self._pins[high])

    def pin(self, labels: Sequence[Axis | None], reason: str) -> None:
        for axis in labels:
            if axis is not None:
                self._pins.setdefault(self.find(axis.variable), reason)

    def pinned(self, variable: int) -> str | None:
        return self._pins.get(self.find(variable))


@dataclass(slots=True)
class _Use:
    """One call of a layer, with the variables it writes, follows or reads."""

    path: str
    operation: Operation
    out_axis: Axis | None
    in_axis: Axis | None
    follower: bool


class _Propagation(fx.Interpreter):
    """Runs the traced host on a small batch and labels every dimension of every value."""

    def __init__(self, traced: fx.GraphModule, unfit: Mapping[str, str]) -> None:
        super().__init__(traced, garbage_collect_values=False)
        self.unfit = unfit
        self.channels = _Channels()
        self.labels: dict[fx.Node, Labels] = {}
        self.uses: list[_Use] = []
        self.fetched: set[str] = set()
        self.free_flops = 0.0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        self.labels[n] = self._label(n, result)
        return result

    # -------------------------------------------------- helpers

    def _of(self, node: object) -> Labels:
        return self.labels.get(node, ()) if isinstance(node, fx.Node) else ()

    def _shape(self, node: fx.Node) -> tuple[int, ...]:
        value = self.env[node]
        return tuple(value.shape) if isinstance(value, Tensor) else ()

    def _pin_inputs(self, node: fx.Node, reason: str) -> None:
        for source in node.all_input_nodes:
            self.channels.pin(self._of(source), reason)

    def _blank(self, result: object) -> Labels:
        return (None,) * result.dim() if isinstance(result, Tensor) else ()

    def _label(self, node: fx.Node, result: object) -> Labels:
        if node.op == "output":
            self._pin_inputs(node, "its channels are the model's output")
            return ()
        if node.op == "get_attr":
            self.fetched.add(str(node.target))
        if node.op in {"placeholder", "get_attr"}:
            return self._blank(result)
        if not isinstance(result, Tensor):
            return self._label_other(node)
        if node.op == "call_module":
            return self._label_module(node, result)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return self._label_function(node, result, name.rstrip("_") if name not in {"add_", "relu_"} else name)

    def _label_other(self, node: fx.Node) -> Labels:
        """Values that are no tensors: a width that the code reads as a number is fixed, except for reshapes."""
        source = node.args[0] if node.args else None
        if node.target in {operator.getitem, "size"} and isinstance(source, fx.Node) and len(node.args) == 2:
            index = node.args[1]
            if node.target is operator.getitem:
                shape_of = source.args[0] if source.target in {getattr, "size"} and source.args else None
            else:
                shape_of = source
            labels = self._of(shape_of)
            if isinstance(index, int) and -len(labels) <= index < len(labels):
                fixed = any(user.target not in _RESHAPES for user in node.users)
                if fixed:
                    self.channels.pin((labels[index],), "the model's code computes with its width")
                return ()
        if node.target in {getattr, "size", "dim"} or not node.all_input_nodes:
            return ()
        self._pin_inputs(node, f"passes through {_name_of(node)}, which is not known to treat channels one by one")
        return ()

    # -------------------------------------------------- modules

    def _label_module(self, node: fx.Node, result: Tensor) -> Labels:
        path = str(node.target)
        module = self.submodules[path]
        kind = type(module)
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        labels = self._of(source)
        if isinstance(source, fx.Node) and labels:
            if kind is nn.Conv2d and len(labels) == 4:
                return self._label_convolution(path, module, labels, result)
            if kind is nn.Linear:
                axis = self.channels.new()
                self._use(path, Operation.LINEAR, axis, labels[-1], follower=False)
                return (*labels[:-1], axis)
            if kind in NORMALIZATIONS:
                return self._label_normalization(path, NORMALIZATIONS[kind], labels)
            if kind in _POINTWISE_MODULES:
                return labels
            if kind in _POOLING_MODULES:
                return self._pool(labels, result, path)
            if kind is nn.Flatten:
                return self._regroup(self._shape(source), labels, result, path)
        reason = self.unfit.get(path) or _module_reason(kind)
        self._pin_inputs(node, f"passes through {path}: {reason}")
        if isinstance(module, nn.MultiheadAttention) and isinstance(source := node.args[0], fx.Node):
            tokens, features = self._shape(source)[-2:]
            self.free_flops += 8.0 * tokens * features**2 + 4.0 * tokens**2 * features
        return self._blank(result)

    def _use(
        self, path: str, operation: Operation, out_axis: Axis | None, in_axis: Axis | None, *, follower: bool
    ) -> None:
        self.uses.append(_Use(path, operation, out_axis, in_axis, follower))
        reason = self.unfit.get(path)
        if reason is not None:
            self.channels.pin((out_axis, in_axis), f"{path}: {reason}")

    def _label_convolution(self, path: str, module: nn.Module, labels: Labels, result: Tensor) -> Labels:
        convolution = cast("nn.Conv2d", module)
        self.channels.pin(labels[2:], f"{path} convolves along it")
        incoming = labels[1]
        if incoming is not None and incoming.factor != 1:
            self.channels.pin((incoming,), f"{path} reads it after a flatten")
        if convolution.groups > 1 and convolution.groups == convolution.in_channels == convolution.out_channels:
            self._use(path, Operation.DEPTHWISE_CONV2D, incoming, None, follower=True)
            return (labels[0], incoming, *(None,) * (result.dim() - 2))
        axis = self.channels.new()
        self._use(path, Operation.CONV2D, axis, incoming, follower=False)
        if convolution.groups > 1:
            self.channels.pin((incoming, axis), f"{path} is a grouped convolution")
        return (labels[0], axis, *(None,) * (result.dim() - 2))

    def _label_normalization(self, path: str, operation: Operation, labels: Labels) -> Labels:
        axis = labels[1]
        if axis is not None and axis.factor != 1:
            self.channels.pin((axis,), f"{path} normalizes it after a flatten")
        self._use(path, operation, axis, None, follower=True)
        return labels

    # -------------------------------------------------- functions and methods

    def _label_function(self, node: fx.Node, result: Tensor, name: str) -> Labels:
        source = node.args[0] if node.args else None
        labels = self._of(source)
        if name in _BINARY:
            return self._broadcast(node, result)
        if isinstance(source, fx.Node) and labels:
            if name in _POINTWISE and len(labels) == result.dim():
                return labels
            if name in _POOLING:
                return self._pool(labels, result, _name_of(node))
            if name in _REDUCTIONS:
                return self._reduce(node, labels, result)
            if name in _RESHAPES:
                return self._reshape(node, self._shape(source), labels, result, name)
            if name == "getitem":
                return self._index(node, labels, result)
            if name in {"permute", "transpose"}:
                return self._permute(node, labels, name)
        if name in {"conv2d", "linear"} and isinstance(node.args[1], fx.Node):
            weight = cast("Tensor", self.env[node.args[1]])
            self.free_flops += 2.0 * result.numel() * weight[0].numel() / result.shape[0]
        if name in _PRODUCTS and isinstance(source, fx.Node):
            self.free_flops += 2.0 * result.numel() * self._shape(source)[-1] / result.shape[0]
        if name == "scaled_dot_product_attention" and isinstance(node.args[1], fx.Node):
            keys = self._shape(node.args[1])[-2]
            self.free_flops += 4.0 * result.numel() * keys / result.shape[0]
        self._pin_inputs(node, f"passes through {_name_of(node)}, which is not known to treat channels one by one")
        return self._blank(result)

    def _broadcast(self, node: fx.Node, result: Tensor) -> Labels:
        out: list[Axis | None] = list(self._blank(result))
        for source in node.all_input_nodes:
            labels, shape = self._of(source), self._shape(source)
            for back in range(1, len(shape) + 1):
                axis = labels[-back]
                if axis is None and shape[-back] == 1:
                    continue
                present = out[-back]
                if axis is not None and present is not None:
                    self.channels.unite(axis.variable, present.variable)
                    if axis.factor != present.factor:
                        self.channels.pin((axis,), f"{_name_of(node)} combines different layouts of it")
                out[-back] = axis or present
        for source in node.all_input_nodes:
            labels, shape = self._of(source), self._shape(source)
            for back in range(1, len(shape) + 1):
                if labels[-back] is None and shape[-back] != 1:
                    self.channels.pin((out[-back],), f"{_name_of(node)} combines it with channels that cannot grow")
        return tuple(out)

    def _pool(self, labels: Labels, result: Tensor, name: str) -> Labels:
        if result.dim() != len(labels) or len(labels) < 3:
            self.channels.pin(labels, f"{name} pools it without a batch dimension")
            return self._blank(result)
        self.channels.pin(labels[2:], f"{name} pools over it")
        return (*labels[:2], *(None,) * (len(labels) - 2))

    def _reduce(self, node: fx.Node, labels: Labels, result: Tensor) -> Labels:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
        if dims is None or not isinstance(dims, int | tuple | list):
            reduced = set(range(len(labels)))
        else:
            chosen = [dims] if isinstance(dims, int) else [d for d in dims if isinstance(d, int)]
            reduced = {d % len(labels) for d in chosen}
        self.channels.pin([labels[d] for d in reduced], f"{_name_of(node)} reduces over it")
        if result.dim() == len(labels):
            return tuple(None if d in reduced else axis for d, axis in enumerate(labels))
        return tuple(axis for d, axis in enumerate(labels) if d not in reduced)

    def _reshape(self, node: fx.Node, shape: tuple[int, ...], labels: Labels, result: Tensor, name: str) -> Labels:
        out = self._regroup(shape, labels, result, _name_of(node))
        if name in {"view", "reshape"}:
            first = node.args[1] if len(node.args) > 1 else node.kwargs.get("shape")
            sizes = first if isinstance(first, tuple | list) else node.args[1:]
            for axis, size in zip(out, sizes, strict=False):
                if isinstance(size, int) and size != -1:
                    self.channels.pin((axis,), f"{_name_of(node)} reshapes it to a fixed size")
        return out

    def _regroup(self, shape: tuple[int, ...], labels: Labels, result: Tensor, name: str) -> Labels:
        """Labels behind a reshape: a channel dimension may take up the ones behind it, nothing else."""
        out: list[Axis | None] = list(self._blank(result))
        for sources, targets in _groups(shape, tuple(result.shape)):
            labelled = [d for d in sources if labels[d] is not None]
            if not labelled:
                continue
            axis = labels[labelled[0]]
            wide = [d for d in sources if shape[d] != 1]
            into = [d for d in targets if result.shape[d] != 1]
            if axis is None or labelled != wide[:1] or len(into) != 1:
                self.channels.pin([labels[d] for d in labelled], f"{name} splits or mixes it")
                continue
            rest = math.prod(shape[d] for d in wide[1:])
            out[into[0]] = Axis(axis.variable, axis.factor * rest)
        return tuple(out)

    def _index(self, node: fx.Node, labels: Labels, result: Tensor) -> Labels:
        """Labels behind ``x[:, :, None]`` and the like: whole dimensions stay, new ones come in between."""
        given = node.args[1]
        index = given if isinstance(given, tuple) else (given,)
        left = list(labels)
        out: list[Axis | None] = []
        for item in index:
            if item is None:
                out.append(None)
            elif isinstance(item, slice) and left:
                axis = left.pop(0)
                if item != slice(None):
                    self.channels.pin((axis,), "getitem takes a part of it")
                    axis = None
                out.append(axis)
            elif isinstance(item, int) and left:
                self.channels.pin((left.pop(0),), "getitem takes a part of it")
            else:
                self.channels.pin(labels, "getitem takes a part of it")
                return self._blank(result)
        return (*out, *left)

    def _permute(self, node: fx.Node, labels: Labels, name: str) -> Labels:
        given = node.args[1:]
        flat = [d for arg in given for d in (arg if isinstance(arg, tuple | list) else (arg,))]
        dims = [d % len(labels) for d in flat if isinstance(d, int)]
        if name == "permute" and len(dims) == len(labels):
            return tuple(labels[d] for d in dims)
        if name == "transpose" and len(dims) == 2:
            swapped = list(labels)
            swapped[dims[0]], swapped[dims[1]] = labels[dims[1]], labels[dims[0]]
            return tuple(swapped)
        self.channels.pin(labels, f"{_name_of(node)} moves it in a way that is not constant")
        return (None,) * len(labels)


def _groups(before: tuple[int, ...], after: tuple[int, ...]) -> Iterator[tuple[list[int], list[int]]]:
    """Split a reshape into the smallest groups of dimensions with equal products.

    Dimensions of size 1 join the group before them, so that a labelled first dimension stays first.
    """
    i = j = 0
    while i < len(before) and j < len(after):
        sources, targets = [i], [j]
        size_in, size_out = before[i], after[j]
        i, j = i + 1, j + 1
        while size_in != size_out:
            if size_in < size_out:
                size_in *= before[i]
                sources.append(i)
                i += 1
            else:
                size_out *= after[j]
                targets.append(j)
                j += 1
        while i < len(before) and before[i] == 1 and (j >= len(after) or after[j] != 1):
            sources.append(i)
            i += 1
        yield sources, targets


def _name_of(node: fx.Node) -> str:
    target = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _module_reason(kind: type[nn.Module]) -> str:
    if kind in {nn.LayerNorm, nn.GroupNorm, nn.RMSNorm}:
        return f"{kind.__name__} takes its statistics over several channels, so new ones would change old ones"
    return f"{kind.__name__} is not known to treat channels one by one"


# ------------------------------------------------------------------ putting it together


def _unfit(model: nn.Module, calls: _Calls) -> dict[str, str]:
    """Layers that cannot be taken apart, with the reason, judged without looking at the graph."""
    owners: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] += 1
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        if calls.count[path] > 1:
            reasons[path] = "it is used at several places"
        elif any(owners[id(parameter)] > 1 for parameter in module.parameters(recurse=False)):
            reasons[path] = "it shares its weights with another layer"
        elif module._forward_hooks or module._forward_pre_hooks:
            reasons[path] = "it has forward hooks, which a widened layer would not run"
        elif getattr(module, "padding_mode", "zeros") != "zeros":
            reasons[path] = f"padding mode {module.padding_mode!r} cannot be widened"
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and not (
            module.affine and module.track_running_stats and module.momentum is not None
        ):
            reasons[path] = "normalization without gain, running statistics or momentum cannot be widened"
    return reasons


def _span_slots(model: nn.Module, calls: _Calls, sites: Mapping[str, Site]) -> dict[str, SpanSlot]:
    """Modules that directly hold a layer (or, in a flat host, the layers themselves) and map tensor to tensor."""
    spans: dict[str, SpanSlot] = {}
    for path, module in model.named_modules():
        holds = any(isinstance(child, _MULTIPLYING) for child in module.children())
        flat = (
            "." not in path and isinstance(module, _MULTIPLYING) and path in sites and sites[path].out_slot is not None
        )
        if not path or not (holds or flat) or calls.count[path] != 1 or path in calls.last:
            continue
        if isinstance(module, nn.MultiheadAttention) or len(calls.inputs[path]) != 1:
            continue
        before, after = calls.inputs[path][0][1:], calls.outputs[path][0][1:]
        if len(before) != len(after) or not before:
            continue
        name = SPAN_PREFIX + path
        spans[name] = SpanSlot(name, path, before, after)
    return spans


def _costs(
    model: nn.Module, calls: _Calls, sites: Mapping[str, Site], widths: Mapping[str, int], free_flops: float
) -> tuple[Cost, ...]:
    terms: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
    billed: set[int] = set()
    terms[()] = [free_flops, 0.0]

    def bill(slots: tuple[str, ...], flops: float, parameters: float) -> None:
        share = math.prod(widths[slot] for slot in slots)
        terms[slots][0] += flops / share
        terms[slots][1] += parameters / share

    for path, module in model.named_modules():
        site = sites.get(path)
        slots = tuple(slot for slot in (site.out_slot, site.in_slot) if slot) if site else ()
        flops = 0.0
        if isinstance(module, _MULTIPLYING):
            flops = sum(2.0 * module.weight[0].numel() * math.prod(s[1:]) for s in calls.outputs[path])
        elif isinstance(module, _NORMALIZING):
            flops = sum(2.0 * math.prod(s[1:]) for s in calls.outputs[path])
        own = [p for p in module.parameters(recurse=False) if id(p) not in billed]
        billed.update(id(p) for p in own)
        # Vectors (biases, gains) go with the output channels alone, matrices with both sides.
        vectors = float(sum(p.numel() for p in own if p.dim() == 1))
        matrices = float(sum(p.numel() for p in own if p.dim() != 1))
        bill(slots, flops, matrices)
        bill((site.out_slot,) if site and site.out_slot else (), 0.0, vectors)
    return tuple(Cost(flops, parameters, slots) for slots, (flops, parameters) in terms.items() if flops or parameters)


def analyze(model: nn.Module, example: Tensor) -> Analysis:
    """Find where ``model`` can grow and what it costs.

    The model is run a few times in evaluation mode on (at most two samples of) ``example``; its weights,
    buffers, training flags and the random streams are as before afterwards.

    Args:
        model: Any module whose forward takes one tensor.
        example: A batch of inputs; the first dimension is the batch.
    """
    batch = example[:2]
    with undisturbed(model, batch.device):
        calls = _observe(model, batch)
        attributes = set(model.__dict__)
        try:
            traced, refused = _trace(model)
        finally:
            for name in set(model.__dict__) - attributes:  # fx leaves tensors that the code makes on the module
                delattr(model, name)
        run: _Propagation | None = None
        if traced is not None:
            run = _Propagation(traced, _unfit(model, calls) | refused)
            run.run(batch)
    slots: dict[str, WidthSlot] = {}
    sites: dict[str, Site] = {}
    if run is not None:
        _pin_fetched(run)
        slots, sites = _width_slots(model, run, refused)
    widths = {name: slot.width for name, slot in slots.items()}
    free = run.free_flops if run is not None else 0.0
    shapes = {p: (calls.inputs[p][0][1:], calls.outputs[p][0][1:]) for p in calls.inputs if calls.count[p] == 1}
    costs = _costs(model, calls, sites, widths, free)
    return Analysis(slots, _span_slots(model, calls, sites), dict(refused), sites, shapes, costs)


def _pin_fetched(run: _Propagation) -> None:
    """Layers whose tensors the model's code reads by itself cannot be replaced."""
    for use in run.uses:
        if any(name.startswith(f"{use.path}.") for name in run.fetched):
            run.channels.pin((use.out_axis, use.in_axis), f"the model's code reads the weights of {use.path} itself")


def _width_slots(
    model: nn.Module, run: _Propagation, refused: dict[str, str]
) -> tuple[dict[str, WidthSlot], dict[str, Site]]:
    members: dict[int, tuple[list[str], list[str], list[str]]] = defaultdict(lambda: ([], [], []))
    for use in run.uses:
        if use.out_axis is not None:
            role = 1 if use.follower else 0
            members[run.channels.find(use.out_axis.variable)][role].append(use.path)
        if use.in_axis is not None:
            members[run.channels.find(use.in_axis.variable)][2].append(use.path)
    slots: dict[str, WidthSlot] = {}
    names: dict[int, str] = {}
    for root, (writers, followers, readers) in members.items():
        name = writers[0]
        reason = run.channels.pinned(root) or (None if readers else "nothing that can be widened reads its channels")
        if reason is not None:
            refused[name] = reason
            continue
        width = cast("nn.Linear", model.get_submodule(name)).weight.shape[0]
        names[root] = name
        slots[name] = WidthSlot(name, width, tuple(writers), tuple(followers), tuple(readers))
    sites: dict[str, Site] = {}
    for use in run.uses:
        out_slot = names.get(run.channels.find(use.out_axis.variable)) if use.out_axis else None
        in_slot = names.get(run.channels.find(use.in_axis.variable)) if use.in_axis else None
        if out_slot or in_slot:
            factor = use.in_axis.factor if use.in_axis and in_slot else 1
            sites[use.path] = Site(use.path, use.operation, out_slot, in_slot, factor)
    return slots, sites


__all__ = ["Analysis", "Cost", "Site", "SpanSlot", "WidthSlot", "analyze", "undisturbed"]
