"""Labels every dimension of every value of a traced host by the channels it holds (an abstract interpretation).

What treats channels one by one passes labels on; what must keep channels equal (sums, normalizations, depthwise
layers) unites them; what splits channels into parts of constant size makes the parts the unit of growth; what mixes
or fixes channels in a way we do not know *pins* them, with the reason.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

from torch import Tensor, fx, nn

from services.blueprints.vocabulary import Operation
from services.kasmina.channels import Axis, Channels, Labels, Piece, groups

CONVOLUTIONS: Mapping[type[nn.Module], tuple[Operation, Operation]] = {
    nn.Conv1d: (Operation.CONV1D, Operation.DEPTHWISE_CONV1D),
    nn.Conv2d: (Operation.CONV2D, Operation.DEPTHWISE_CONV2D),
    nn.Conv3d: (Operation.CONV3D, Operation.DEPTHWISE_CONV3D),
}
"""Operation of a convolution, and of a depthwise one."""

BATCH_NORMALIZATIONS: Mapping[type[nn.Module], Operation] = {
    nn.BatchNorm1d: Operation.BATCH_NORM1D,
    nn.BatchNorm2d: Operation.BATCH_NORM2D,
    nn.BatchNorm3d: Operation.BATCH_NORM3D,
}
MULTIPLYING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
"""Layers that are billed two FLOPs per multiply-add."""
NORMALIZING = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Layers that are billed two FLOPs per element."""

_WAYS_OUT: Mapping[type[nn.Module], str] = {
    nn.MultiheadAttention: "it divides the width of its stream by its number of heads, so that neither can change "
    "alone, and projects query, key and value by one weight: write query, key, value and output as linear layers with "
    "x.view(batch, tokens, -1, head_dim) and scaled_dot_product_attention, and heads can grow",
    nn.TransformerEncoderLayer: "it holds a MultiheadAttention, which fixes the width of its stream (its feed-forward "
    "can grow): write the block with linear layers, LayerNorm and scaled_dot_product_attention, and its stream and "
    "heads can grow too",
    nn.TransformerEncoder: "its layers hold a MultiheadAttention, which fixes the width of their stream (their "
    "feed-forwards can grow): write the block with linear layers, LayerNorm and scaled_dot_product_attention, and its "
    "stream and heads can grow too",
    nn.TransformerDecoderLayer: "it holds MultiheadAttentions: write the block with linear layers, LayerNorm and "
    "scaled_dot_product_attention",
    nn.Embedding: "a table of embeddings is not widened: put a linear layer behind it, which can grow",
    nn.EmbeddingBag: "a table of embeddings is not widened: put a linear layer behind it, which can grow",
    **dict.fromkeys(
        (nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell),
        "its gates share one matrix and its state has a fixed size: what lies before and behind it can grow apart",
    ),
    **dict.fromkeys(
        (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        "transposed convolutions are not widened: use nn.Upsample and a convolution",
    ),
}

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
_SCALING = frozenset({"mul", "imul", "mul_"})
_DIVIDING = frozenset({"truediv", "itruediv", "div", "div_"})
_BINARY = frozenset({"add", "iadd", "add_", "sub", "isub", "sub_"}) | _SCALING | _DIVIDING
_REDUCTIONS = frozenset({"mean", "sum", "amax", "amin", "logsumexp"})
_RESHAPES = frozenset({"flatten", "view", "reshape", "squeeze", "unsqueeze"})
_SIZED = _RESHAPES | {"expand"}
_PRODUCTS = frozenset({"matmul", "bmm", "mm"})
_SOFTMAX = frozenset({"softmax", "log_softmax"})
_CONCATENATIONS = frozenset({"cat", "concat", "concatenate"})
_PARTS = frozenset({"chunk", "split", "unbind", "tensor_split"})
_IN_PARTS = (
    "splits or mixes it: a number of parts that the code fixes cannot grow; write one layer for each of query, key and "
    "value and view(batch, tokens, -1, head_dim), and heads can"
)


@dataclass(slots=True)
class Use:
    """One call of a layer (or one reading of a model's own Parameter), with the axes it writes, follows or reads.

    ``dimension`` is that of a Parameter's channels.
    """

    path: str
    operation: Operation
    out_axis: Axis | None
    in_axis: Axis | None
    follower: bool
    dimension: int = 0


@dataclass(frozen=True, slots=True)
class Product:
    """FLOPs of a product that is no layer, for the whole of ``axes`` (those of its output that can grow)."""

    flops: float
    axes: tuple[Axis, ...] = ()


class Propagation(fx.Interpreter):
    """Runs the traced host on a small batch and labels every dimension of every value.

    Args:
        traced: The host.
        unfit: Path and reason of the layers and Parameters that cannot be taken apart.
        parameters: Paths of the Parameters that belong to no layer of torch's.
        prefix: Path of the traced module in the host, with a dot behind it; empty for the host itself.
        leaving: Why what leaves the traced module is fixed.
    """

    def __init__(
        self,
        traced: fx.GraphModule,
        unfit: Mapping[str, str],
        parameters: frozenset[str],
        *,
        prefix: str = "",
        leaving: str = "its channels are the model's output",
    ) -> None:
        super().__init__(traced, garbage_collect_values=False)
        self.prefix = prefix
        self.leaving = leaving
        self.unfit = unfit
        self.parameters = parameters
        self.channels = Channels()
        self.labels: dict[fx.Node, Labels] = {}
        self.uses: list[Use] = []
        self.fetched: set[str] = set()
        self.products: list[Product] = []
        #: Axes that can grow of the positions a layer is applied at, by its path: its FLOPs are a multiple of them.
        self.spread: dict[str, tuple[Axis, ...]] = {}
        self._sizes: dict[fx.Node, Axis | None] = {}
        self._held: dict[str, Labels] = {}
        self._from_parameter: dict[fx.Node, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and label its result."""
        result = super().run_node(n)
        self.labels[n] = self._label(n, result)
        sources = n.all_input_nodes
        if len(sources) == 1 and sources[0] in self._from_parameter:
            self._from_parameter[n] = self._from_parameter[sources[0]]
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

    def _unknown(self, node: fx.Node) -> str:
        name = name_of(node)
        known = f"passes through {name}, which is not known to treat channels one by one"
        return f"{known}: write a layer for each part" if name in _PARTS else known

    def _label(self, node: fx.Node, result: object) -> Labels:
        if node.op == "output":
            self._pin_inputs(node, self.leaving)
            return ()
        if node.op == "get_attr":
            return self._label_parameter(node, self.prefix + str(node.target), result)
        if node.op == "placeholder":
            return self._blank(result)
        if not isinstance(result, Tensor):
            return self._label_opaque(node) if node.op == "call_module" else self._label_other(node)
        if node.op == "call_module":
            return self._label_module(node, result)
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))
        return self._label_function(node, result, name.rstrip("_") if name not in {"add_", "relu_"} else name)

    def _label_parameter(self, node: fx.Node, path: str, result: object) -> Labels:
        """A Parameter of the model's own may hold channels in any dimension: which, its surroundings show."""
        self.fetched.add(path)
        if path not in self.parameters or not isinstance(result, Tensor):
            return self._blank(result)
        if path not in self._held:
            axes = tuple(self.channels.new(size) if size > 1 else None for size in result.shape)
            for dimension, axis in enumerate(axes):
                if axis is not None:
                    self._use(path, Operation.PARAMETER, axis, None, follower=False, dimension=dimension)
            self._held[path] = axes
        self._from_parameter[node] = path
        return self._held[path]

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
                self._sizes[node] = labels[index]
                if any(user.target not in _SIZED for user in node.users):
                    self.channels.pin((labels[index],), "the model's code computes with its width")
                return ()
        if node.target in {getattr, "size", "dim"} or not node.all_input_nodes:
            return ()
        self._pin_inputs(node, self._unknown(node))
        return ()

    # -------------------------------------------------- modules

    def _label_module(self, node: fx.Node, result: Tensor) -> Labels:
        path, module = self.prefix + str(node.target), self.submodules[str(node.target)]
        kind = type(module)
        source = node.args[0] if len(node.args) == 1 and not node.kwargs else None
        labels = self._of(source)
        if isinstance(source, fx.Node) and labels:
            if kind in CONVOLUTIONS and len(labels) == module.weight.dim():
                return self._label_convolution(path, module, labels, result)
            if kind is nn.Linear:
                axis = self.channels.new(result.shape[-1])
                self._use(path, Operation.LINEAR, axis, labels[-1], follower=False)
                self.spread[path] = self._growing(labels[:-1])
                return (*labels[:-1], axis)
            if isinstance(module, NORMALIZING):
                return self._label_normalization(path, module, labels)
            passed = self._pass(path, module, labels, self._shape(source), result)
            if passed is not None:
                return passed
        return self._label_opaque(node) or self._blank(result)

    def _pass(
        self, path: str, module: nn.Module, labels: Labels, shape: tuple[int, ...], result: Tensor
    ) -> Labels | None:
        """Labels behind a module without channels of its own; ``None`` for one that is not known."""
        kind = type(module)
        if kind in _POINTWISE_MODULES or (kind is nn.PReLU and cast("nn.PReLU", module).num_parameters == 1):
            return labels
        if kind in _POOLING_MODULES:
            return self._pool(labels, result, path)
        if kind is nn.Flatten:
            return self._regroup(labels, result, path, shape)
        if kind is nn.Softmax and isinstance(dim := cast("nn.Softmax", module).dim, int):
            self.channels.pin((labels[dim],), f"passes through {path}: {_module_reason(kind)}")
            return labels
        return None

    def _label_opaque(self, node: fx.Node) -> Labels:
        path, module = self.prefix + str(node.target), self.submodules[str(node.target)]
        self._pin_inputs(node, f"passes through {path}: {self.unfit.get(path) or _module_reason(type(module))}")
        source = node.args[0] if node.args else None
        if isinstance(source, fx.Node) and isinstance(self.env[source], Tensor):
            if isinstance(module, nn.MultiheadAttention):
                self._bill_attention(module, self._shape(source))
            for name, inner in module.named_modules(prefix=path):
                if type(inner) is nn.TransformerEncoderLayer:
                    self._label_encoder_layer(name, inner, self._shape(source))
        return ()

    def _bill_attention(self, module: nn.MultiheadAttention, shape: tuple[int, ...]) -> None:
        """Four projections and two products; hooks do not see them, since they are no calls of layers."""
        tokens, features = shape[-2 if module.batch_first or len(shape) < 3 else 0], shape[-1]
        self.products.append(Product(8.0 * tokens * features**2 + 4.0 * tokens**2 * features))

    def _label_encoder_layer(self, path: str, layer: nn.TransformerEncoderLayer, shape: tuple[int, ...]) -> None:
        """The feed-forward of torch's own block, which fx cannot look into: linear1, activation, dropout, linear2.

        Its forward may read both weights and hand them to a fused kernel, which computes the same.
        """
        self._bill_attention(layer.self_attn, shape)
        if type(layer.linear1) is not nn.Linear or type(layer.linear2) is not nn.Linear:
            return
        hidden, stream = (self.channels.new(linear.out_features) for linear in (layer.linear1, layer.linear2))
        self._use(f"{path}.linear1", Operation.LINEAR, hidden, None, follower=False)
        self._use(f"{path}.linear2", Operation.LINEAR, stream, hidden, follower=False)
        self.channels.pin((stream,), "its channels join the stream of a MultiheadAttention, which fixes their number")
        activation = layer.activation
        name = getattr(activation, "__name__", type(activation).__name__)
        if type(activation) not in _POINTWISE_MODULES and name not in _POINTWISE:
            self.channels.pin((hidden,), f"passes through {name}, which is not known to treat channels one by one")

    def _use(
        self,
        path: str,
        operation: Operation,
        out_axis: Axis | None,
        in_axis: Axis | None,
        *,
        follower: bool,
        dimension: int = 0,
    ) -> None:
        self.uses.append(Use(path, operation, out_axis, in_axis, follower, dimension))
        reason = self.unfit.get(path)
        if reason is not None:
            self.channels.pin((out_axis, in_axis), f"{path}: {reason}")

    def _label_convolution(self, path: str, module: nn.Module, labels: Labels, result: Tensor) -> Labels:
        convolution = cast("nn.Conv2d", module)
        ordinary, depthwise = CONVOLUTIONS[type(module)]
        self.channels.pin((labels[0], *labels[2:]), f"{path} convolves along it")
        incoming = labels[1]
        behind = (None,) * (result.dim() - 2)
        if convolution.groups > 1 and convolution.groups == convolution.in_channels:
            # Each channel has the same number of filters, its outputs stand together.
            out = None if incoming is None else incoming.times(convolution.out_channels // convolution.groups)
            self._use(path, depthwise, out, None, follower=True)
            return (labels[0], out, *behind)
        axis = self.channels.new(result.shape[1])
        self._use(path, ordinary, axis, incoming, follower=False)
        if convolution.groups > 1:
            reason = f"{path} is a grouped convolution, whose groups have fixed sizes: only depthwise ones can grow"
            self.channels.pin((incoming, axis), reason)
        return (labels[0], axis, *behind)

    def _label_normalization(self, path: str, module: nn.Module, labels: Labels) -> Labels:
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            self._use_layer_norm(path, module, labels)
            self.spread[path] = self._growing(labels[: -len(module.normalized_shape)])
        elif isinstance(module, nn.GroupNorm):
            self._use_group_norm(path, module, labels)
        else:
            self.channels.pin((labels[0], *labels[2:]), f"{path} normalizes over it")
            self._use(path, BATCH_NORMALIZATIONS[type(module)], labels[1], None, follower=True)
        return labels

    def _use_layer_norm(self, path: str, norm: nn.LayerNorm | nn.RMSNorm, labels: Labels) -> None:
        over = labels[-len(norm.normalized_shape) :]
        if len(over) > 1:
            reason = "it normalizes over several dimensions with a gain for each entry, which cannot be widened"
            self.channels.pin(over, f"{path}: {type(norm).__name__}: {reason}")
        elif over[0] is not None:
            operation = Operation.LAYER_NORM if type(norm) is nn.LayerNorm else Operation.RMS_NORM
            self._use(path, operation, over[0], None, follower=True)

    def _use_group_norm(self, path: str, norm: nn.GroupNorm, labels: Labels) -> None:
        axis = labels[1]
        self.channels.pin(labels[2:], f"{path} normalizes over it")
        self._use(path, Operation.GROUP_NORM, axis, None, follower=True)
        if norm.num_groups > 1 and axis is not None:
            # New groups of the same size beside the old ones leave those as they are.
            if len(axis.pieces) > 1 or axis.pieces[0].factor != 1:
                self.channels.pin((axis,), f"{path}: the groups of a GroupNorm would move over a concatenation")
            elif (variable := axis.pieces[0].variable) is not None:
                self.channels.refine(variable, norm.num_channels // norm.num_groups)

    # -------------------------------------------------- functions and methods

    def _label_function(self, node: fx.Node, result: Tensor, name: str) -> Labels:
        source = node.args[0] if node.args else None
        labels = self._of(source)
        if name in _BINARY:
            return self._broadcast(node, result, name)
        if name in _CONCATENATIONS:
            return self._concatenate(node, result)
        if name in _POINTWISE and len(labels) == result.dim():
            return labels
        rule = _RULES.get(name) if labels else None
        passed = None if rule is None else rule(self, node, labels, result)
        if passed is not None:
            return passed
        if name in {"conv1d", "conv2d", "conv3d", "linear"} and isinstance(node.args[1], fx.Node):
            weight = cast("Tensor", self.env[node.args[1]])
            self.products.append(Product(2.0 * result.numel() * weight[0].numel() / result.shape[0]))
        self._pin_inputs(node, self._unknown(node))
        return self._blank(result)

    def _broadcast(self, node: fx.Node, result: Tensor, name: str) -> Labels:
        if name in _SCALING | _DIVIDING:
            self._mark_gains(node, name)
        return self._merge([(self._of(n), self._shape(n)) for n in node.all_input_nodes], result, name_of(node))

    def _mark_gains(self, node: fx.Node, name: str) -> None:
        """A Parameter that multiplies channels is no summand of theirs: its newborns are like its present entries."""
        paths = {self._from_parameter[source] for source in node.all_input_nodes if source in self._from_parameter}
        for use in self.uses:
            if use.path in paths and use.operation is Operation.PARAMETER:
                use.follower = True
                if name in _DIVIDING:
                    self.channels.pin((use.out_axis,), f"the model's code divides by {use.path}, or {use.path} itself")

    def _merge(
        self, sources: Sequence[tuple[Labels, tuple[int, ...]]], result: Tensor, name: str, skip: int | None = None
    ) -> Labels:
        """Labels of an elementwise combination: dimensions that meet become one (``skip``, from the end, does not)."""
        out: list[Axis | None] = list(self._blank(result))
        for labels, shape in sources:
            for back in range(1, len(shape) + 1):
                axis = labels[-back]
                if back == skip or (axis is None and shape[-back] == 1):
                    continue
                present = out[-back]
                if axis is not None and present is not None:
                    self.channels.unite(axis, present, f"{name} combines different layouts of it")
                out[-back] = axis or present
        for labels, shape in sources:
            for back in range(1, len(shape) + 1):
                if back != skip and labels[-back] is None and shape[-back] != 1:
                    self.channels.pin((out[-back],), f"{name} combines it with channels that cannot grow")
        return tuple(out)

    def _concatenate(self, node: fx.Node, result: Tensor) -> Labels:
        given = node.args[0] if node.args else node.kwargs.get("tensors")
        dim = _argument(node, 1, "dim", 0)
        nodes = [n for n in given if isinstance(n, fx.Node)] if isinstance(given, tuple | list) else []
        if not nodes or not isinstance(dim, int) or any(len(self._of(n)) != result.dim() for n in nodes):
            self._pin_inputs(node, self._unknown(node))
            return self._blank(result)
        along = dim % result.dim()
        sources = [(self._of(n), self._shape(n)) for n in nodes]
        out = list(self._merge(sources, result, name_of(node), skip=result.dim() - along))
        pieces: list[Piece] = []
        for labels, shape in sources:
            axis = labels[along]
            pieces += axis.pieces if axis is not None else (Piece(None, _ONE, shape[along]),)
        out[along] = Axis(tuple(pieces)) if any(piece.variable is not None for piece in pieces) else None
        return tuple(out)

    def _product(self, node: fx.Node, labels: Labels, result: Tensor) -> Labels:
        """Labels of ``a @ b``: rows of ``a``, columns of ``b``; what is summed over cannot grow."""
        del labels
        factors = [n for n in node.args if isinstance(n, fx.Node)]
        shapes = [self._shape(n) for n in factors]
        contracted = shapes[0][-1]
        flops = 2.0 * result.numel() * contracted / result.shape[0]
        if len(factors) != 2 or min(len(shape) for shape in shapes) < 2:
            self._pin_inputs(node, self._unknown(node))
            self.products.append(Product(flops))
            return self._blank(result)
        left, right = (self._of(n) for n in factors)
        self.channels.pin((left[-1], right[-2]), f"{name_of(node)} sums over it")
        batch = [
            ((*left[:-2], None, None), (*shapes[0][:-2], 1, 1)),
            ((*right[:-2], None, None), (*shapes[1][:-2], 1, 1)),
        ]
        merged = self._merge(batch, result, name_of(node))
        out = (*merged[:-2], left[-2], right[-1])
        self.products.append(Product(flops, self._growing(out)))
        return out

    def _growing(self, labels: Labels) -> tuple[Axis, ...]:
        """Labelled axes of a product's output, of which its cost is a multiple."""
        for axis in labels:
            if axis is not None and len(axis.pieces) > 1:
                self.channels.pin((axis,), "a product of it is not billed part by part")
        return tuple(axis for axis in labels if axis is not None and len(axis.pieces) == 1)

    def _attend(self, node: fx.Node, labels: Labels, result: Tensor) -> Labels:
        """Labels of scaled_dot_product_attention: heads are a batch dimension; tokens and head entries cannot grow."""
        del labels
        named = ("query", "key", "value")
        inputs = [_argument(node, position, name) for position, name in enumerate(named)]
        query, key, value = (n for n in inputs if isinstance(n, fx.Node))
        for n in (query, key, value):
            self.channels.pin(self._of(n)[-2:], "scaled_dot_product_attention mixes it; heads come before tokens")
        sources = [(self._of(n), self._shape(n)) for n in (query, key, value)]
        mask = _argument(node, 3, "attn_mask")
        if isinstance(mask, fx.Node):
            sources.append((self._of(mask), self._shape(mask)))
        batch = [((*axes[:-2], None, None), (*shape[:-2], 1, 1)) for axes, shape in sources]
        out = self._merge(batch, result, "scaled_dot_product_attention")
        entries = result.numel() / result.shape[0] / result.shape[-1]
        wide = self._shape(query)[-1] + result.shape[-1]
        self.products.append(Product(2.0 * entries * self._shape(key)[-2] * wide, self._growing(out)))
        return out

    def _pool(self, labels: Labels, result: Tensor, name: str) -> Labels:
        if result.dim() != len(labels) or len(labels) < 3:
            self.channels.pin(labels, f"{name} pools it without a batch dimension")
            return self._blank(result)
        self.channels.pin(labels[2:], f"{name} pools over it")
        return (*labels[:2], *(None,) * (len(labels) - 2))

    def _reduce(self, node: fx.Node, labels: Labels, result: Tensor) -> Labels:
        dims = _argument(node, 1, "dim")
        if dims is None or not isinstance(dims, int | tuple | list):
            reduced = set(range(len(labels)))
        else:
            chosen = [dims] if isinstance(dims, int) else [d for d in dims if isinstance(d, int)]
            reduced = {d % len(labels) for d in chosen}
        self.channels.pin([labels[d] for d in reduced], f"{name_of(node)} reduces over it")
        if result.dim() == len(labels):
            return tuple(None if d in reduced else axis for d, axis in enumerate(labels))
        return tuple(axis for d, axis in enumerate(labels) if d not in reduced)

    def _softmax(self, node: fx.Node, labels: Labels, result: Tensor) -> Labels | None:
        del result
        dim = _argument(node, 1, "dim")
        if not isinstance(dim, int):
            return None
        self.channels.pin((labels[dim],), f"passes through {name_of(node)}, which normalizes over it")
        return labels

    def _pool_function(self, node: fx.Node, labels: Labels, result: Tensor) -> Labels:
        return self._pool(labels, result, name_of(node))

    def _reshape(self, node: fx.Node, labels: Labels, result: Tensor) -> Labels:
        out = self._regroup(labels, result, name_of(node), self._shape(node.all_input_nodes[0]))
        if name_of(node) in {"view", "reshape"}:
            self._check_sizes(node, out, "shape")
        return out

    def _check_sizes(self, node: fx.Node, out: Labels, keyword: str) -> None:
        """Pin dimensions that the code gives another size than the channels they hold, a constant or another width."""
        first = node.args[1] if len(node.args) > 1 else node.kwargs.get(keyword)
        name = name_of(node)
        if isinstance(first, fx.Node) and not isinstance(self.env[first], int):
            whole = first.args[0] if first.target in {getattr, "size"} and first.args else None
            sizes: Sequence[object] = self._of(whole) or (first,) * len(out)
        else:
            given = first if isinstance(first, tuple | list) else node.args[1:]
            sizes = [self._sizes.get(size, size) if isinstance(size, fx.Node) else size for size in given]
        for axis, size in zip(out, sizes, strict=False):
            if isinstance(size, int):
                parts = axis is not None and any(piece.factor < 1 for piece in axis.pieces)
                if size != -1:
                    self.channels.pin((axis,), f"{name} {_IN_PARTS if parts else 'reshapes it to a fixed size'}")
            elif not self.channels.same(axis, size if isinstance(size, Axis) else None):
                reason = f"{name} gives it the size of something else (write -1, or flatten, where channels are)"
                self.channels.pin((axis, size if isinstance(size, Axis) else None), reason)

    def _regroup(self, labels: Labels, result: Tensor, name: str, shape: tuple[int, ...]) -> Labels:
        """Labels behind a reshape: channels take up the dimensions behind them, or split into constant parts."""
        out: list[Axis | None] = list(self._blank(result))
        for sources, targets in groups(shape, tuple(result.shape)):
            labelled = [d for d in sources if labels[d] is not None]
            if not labelled:
                continue
            axis = labels[labelled[0]]
            wide = [d for d in sources if shape[d] != 1]
            into = [d for d in targets if result.shape[d] != 1]
            if axis is None or labelled != wide[:1] or not into:
                self.channels.pin([labels[d] for d in labelled], f"{name} splits or mixes it")
                continue
            whole = axis.times(math.prod(shape[d] for d in wide[1:]))
            rest = math.prod(result.shape[d] for d in into[1:])
            part = whole if rest == 1 else self.channels.split(whole, rest)
            if part is None:
                self.channels.pin((axis,), f"{name} splits or mixes it")
            out[into[0]] = part
        return tuple(out)

    def _expand(self, node: fx.Node, labels: Labels, result: Tensor) -> Labels:
        out = (*(None,) * (result.dim() - len(labels)), *labels)
        self._check_sizes(node, out, "size")
        return out

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

    def _permute(self, node: fx.Node, labels: Labels, result: Tensor) -> Labels:
        del result
        name = name_of(node)
        given = node.args[1:]
        flat = [d for arg in given for d in (arg if isinstance(arg, tuple | list) else (arg,))]
        dims = [d % len(labels) for d in flat if isinstance(d, int)]
        if name == "permute" and len(dims) == len(labels):
            return tuple(labels[d] for d in dims)
        if name == "transpose" and len(dims) == 2:
            swapped = list(labels)
            swapped[dims[0]], swapped[dims[1]] = labels[dims[1]], labels[dims[0]]
            return tuple(swapped)
        self.channels.pin(labels, f"{name_of(node)} moves it in a way that is not constant")
        return (None,) * len(labels)


_Rule = Callable[[Propagation, fx.Node, Labels, Tensor], Labels | None]
_RULES: Mapping[str, _Rule] = {
    **dict.fromkeys(_POOLING, Propagation._pool_function),
    **dict.fromkeys(_REDUCTIONS, Propagation._reduce),
    **dict.fromkeys(_RESHAPES, Propagation._reshape),
    **dict.fromkeys(_SOFTMAX, Propagation._softmax),
    **dict.fromkeys(_PRODUCTS, Propagation._product),
    "getitem": Propagation._index,
    "permute": Propagation._permute,
    "transpose": Propagation._permute,
    "expand": Propagation._expand,
    "scaled_dot_product_attention": Propagation._attend,
}
"""How labels pass through functions and methods of one labelled tensor, by name."""

_ONE = Fraction(1)


def _argument(node: fx.Node, position: int, name: str, default: object = None) -> object:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def name_of(node: fx.Node) -> str:
    """What a node calls, in a word."""
    target = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _module_reason(kind: type[nn.Module]) -> str:
    return _WAYS_OUT.get(kind, "") or f"{kind.__name__} is not known to treat channels one by one"


__all__ = ["BATCH_NORMALIZATIONS", "CONVOLUTIONS", "MULTIPLYING", "NORMALIZING", "Product", "Propagation", "Use"]
