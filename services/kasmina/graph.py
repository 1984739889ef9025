"""Where a network can grow: channel sets and spans, found without editing or training anything.

The host is traced by ``torch.fx`` and run once on a small batch, see :mod:`services.kasmina.propagation`. A set of
channels that is written and read and not pinned is a WIDTH slot. A module that maps one tensor to one tensor is a
SPAN. The traced graph is thrown away: fx is for analysis only.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from services.blueprints.vocabulary import Operation
from services.kasmina.channels import Axis
from services.kasmina.model import SPAN_PREFIX
from services.kasmina.propagation import MULTIPLYING, NORMALIZING, Propagation, Use

BLENDED = frozenset({Operation.LAYER_NORM, Operation.RMS_NORM})
"""Followers whose statistics newborn channels would change at once: they come in by degrees."""

READING = (nn.TransformerEncoder, nn.TransformerEncoderLayer)
"""Modules of torch's whose forward reads the attributes of what they hold: a widened layer has them, a branch not."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive entries of one side of a layer.

    Attributes:
        slot: Slot whose channels they are; ``None``: they are fixed.
        factor: Entries per channel of the slot; entries in all where fixed.
    """

    slot: str | None
    factor: int

    def entries(self, width: Callable[[str], int]) -> int:
        """Entries, given the widths of slots."""
        return self.factor if self.slot is None else self.factor * width(self.slot)


@dataclass(frozen=True, slots=True)
class Site:
    """A layer (or a Parameter of the model's own) that touches WIDTH slots.

    Attributes:
        path: Module path in the host, or path of the Parameter.
        operation: What it does, of the closed vocabulary.
        outputs: What its output channels are, in order: of a writer one part, of a follower as many as what it
            follows has.
        inputs: What its input channels are, in order: one part, or several behind a concatenation; empty for followers
            and Parameters.
        axis: Dimension of its weight that holds the output channels: 0 but for Parameters.
        gain: A Parameter that multiplies channels.
    """

    path: str
    operation: Operation
    outputs: tuple[Part, ...]
    inputs: tuple[Part, ...]
    axis: int = 0
    gain: bool = False

    @property
    def out_slot(self) -> str | None:
        """Slot of its output channels if they are of one; ``None`` otherwise."""
        return self.outputs[0].slot if len(self.outputs) == 1 else None

    @property
    def in_slot(self) -> str | None:
        """Slot of its input channels if they are of one; ``None`` otherwise."""
        return self.inputs[0].slot if len(self.inputs) == 1 else None

    def reads(self, slot: str) -> bool:
        """Whether some of its inputs are channels of ``slot``."""
        return any(part.slot == slot for part in self.inputs)

    def writes(self, slot: str) -> bool:
        """Whether some of its outputs are channels of ``slot``."""
        return any(part.slot == slot for part in self.outputs)


@dataclass(frozen=True, slots=True)
class WidthSlot:
    """Channels that must change together. Paths are in forward order.

    Attributes:
        name: Path of the first layer that writes them.
        width: How many there are.
        writers: What writes them: layers, and Parameters that are added to them.
        followers: What follows them one by one.
        readers: What reads them.
        unit: Entries of ``name``'s output per channel: more than 1 where channels are whole heads of an attention or
            whole groups of a normalization.
        blended: Whether a normalization over all channels follows them, so that newborns come in by degrees.
    """

    name: str
    width: int
    writers: tuple[str, ...]
    followers: tuple[str, ...]
    readers: tuple[str, ...]
    unit: int = 1
    blended: bool = False


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
        read: Layers whose weights the module around them reads itself, so that no branch can stand in their place.
    """

    slots: Mapping[str, WidthSlot]
    spans: Mapping[str, SpanSlot]
    refused: Mapping[str, str]
    sites: Mapping[str, Site]
    shapes: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
    costs: tuple[Cost, ...]
    read: frozenset[str] = frozenset()


# ------------------------------------------------------------------ running without a trace


@contextmanager
def undisturbed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode without gradients; training flags and random streams are as before afterwards.

    A stack of torch's blocks runs without its fused kernels: they take nested tensors, whose shapes no hook can read.
    """
    flags = [(module, module.training) for module in model.modules()]
    fused = torch.backends.mha.get_fastpath_enabled()
    stacked = any(isinstance(module, nn.TransformerEncoder) for module, _ in flags)
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            model.eval()
            torch.backends.mha.set_fastpath_enabled(fused and not stacked)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
        for module, training in flags:
            module.training = training


@dataclass(slots=True)
class _Calls:
    """What one forward pass showed about each module, by path."""

    inputs: dict[str, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    outputs: dict[str, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    count: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    arguments: dict[str, Tensor] = field(default_factory=dict)
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
                calls.arguments[path] = args[0]

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


# ------------------------------------------------------------------ putting it together


def _unfit(model: nn.Module, calls: _Calls) -> dict[str, str]:
    """Layers and Parameters that cannot be taken apart, with the reason, judged without looking at the graph."""
    owners: dict[int, int] = defaultdict(int)
    for module in model.modules():
        for _, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners[id(parameter)] += 1
    reasons: dict[str, str] = {}
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        shared = [name for name, parameter in own.items() if owners[id(parameter)] > 1]
        reasons |= {_joined(path, name): "it is shared with another module" for name in shared}
        if calls.count[path] > 1:
            reasons[path] = "it is used at several places"
        elif shared:
            reasons[path] = "it shares its weights with another layer"
        elif module._forward_hooks or module._forward_pre_hooks:
            reasons[path] = "it has forward hooks, which a widened layer would not run"
        elif getattr(module, "padding_mode", "zeros") != "zeros":
            reasons[path] = f"padding mode {module.padding_mode!r} cannot be widened"
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d) and not (
            module.affine and module.track_running_stats and module.momentum is not None
        ):
            reasons[path] = "normalization without gain, running statistics or momentum cannot be widened"
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.RMSNorm) and getattr(module, "weight", None) is None:
            reasons[path] = f"{type(module).__name__} without gain cannot be widened"
    return reasons


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


def _own_parameters(model: nn.Module) -> frozenset[str]:
    """Paths of the Parameters that belong to no layer of torch's but to code of the host's."""
    return frozenset(
        _joined(path, name)
        for path, module in model.named_modules()
        if not type(module).__module__.startswith("torch.")
        for name, _ in module.named_parameters(recurse=False, remove_duplicate=False)
    )


def _span_slots(model: nn.Module, calls: _Calls, sites: Mapping[str, Site]) -> dict[str, SpanSlot]:
    """Modules that directly hold a layer (or, in a flat host, the layers themselves) and map tensor to tensor.

    Branches are made of 2-d convolutions and linear layers and read the first channels of what enters them, so modules
    with other convolutions, and those around a concatenation (where newborn channels do not come last), are left out.
    """
    spans: dict[str, SpanSlot] = {}
    sides = [side for site in sites.values() for side in (site.outputs, site.inputs) if len(side) > 1]
    joined = {part.slot for side in sides for part in side} - {None}
    for path, module in model.named_modules():
        holds = any(isinstance(child, MULTIPLYING) for child in module.children())
        flat = (
            "." not in path and isinstance(module, MULTIPLYING) and path in sites and sites[path].out_slot is not None
        )
        if not path or not (holds or flat) or calls.count[path] != 1 or path in calls.last:
            continue
        if isinstance(module, nn.MultiheadAttention) or len(calls.inputs[path]) != 1:
            continue
        if _within(model, path, READING):
            continue
        inside = [site for name, site in sites.items() if name == path or name.startswith(f"{path}.")]
        if any(isinstance(inner, nn.Conv1d | nn.Conv3d) for inner in module.modules()) or any(
            part.slot in joined for site in inside for part in (*site.outputs, *site.inputs)
        ):
            continue
        before, after = calls.inputs[path][0][1:], calls.outputs[path][0][1:]
        if len(before) != len(after) or not before:
            continue
        name = SPAN_PREFIX + path
        spans[name] = SpanSlot(name, path, before, after)
    return spans


@dataclass(slots=True)
class _Multiples:
    """Costs that are multiples of widths which are nobody's channels there, as heads in a product of an attention.

    Attributes:
        products: FLOPs of products that are no layers, with the slots they are multiples of.
        spread: Slots among the positions that a layer is applied at, by its path.
    """

    products: list[tuple[float, tuple[str, ...]]] = field(default_factory=list)
    spread: dict[str, tuple[str, ...]] = field(default_factory=dict)


class _Bill:
    """Summands of a cost, by the slots whose widths they are multiples of."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        self._widths = widths
        self._terms: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, sides: Sequence[tuple[Part, ...]], flops: float, parameters: float) -> None:
        """Bill a whole layer whose cost is a multiple of the entries of each of its ``sides``."""
        total = math.prod(sum(part.entries(self._widths.__getitem__) for part in side) for side in sides)
        for parts in itertools.product(*sides):
            factor = math.prod(part.factor for part in parts)
            term = self._terms[tuple(part.slot for part in parts if part.slot is not None)]
            term[0] += flops / total * factor
            term[1] += parameters / total * factor

    def costs(self) -> tuple[Cost, ...]:
        return tuple(Cost(f, p, slots) for slots, (f, p) in self._terms.items() if f or p)


def with_named_layers(analysis: Analysis, patterns: Iterable[str]) -> Analysis:
    """``analysis`` with a SPAN slot around each single layer that a pattern names as ``span:<path>``.

    Adapters are merged into single layers, so users may ask for them; by default a network has SPANs around modules.
    """
    wanted = [pattern for pattern in patterns if pattern.startswith(SPAN_PREFIX)]
    spans = dict(analysis.spans)
    for path, site in analysis.sites.items():
        name = SPAN_PREFIX + path
        mixes = site.operation in (Operation.CONV2D, Operation.LINEAR) and path not in analysis.read
        if mixes and name not in spans and any(fnmatch.fnmatchcase(name, pattern) for pattern in wanted):
            spans[name] = SpanSlot(name, path, *analysis.shapes[path])
    return replace(analysis, spans=spans)


def _costs(
    model: nn.Module,
    calls: _Calls,
    sites: Mapping[str, Site],
    widths: Mapping[str, int],
    multiples: _Multiples,
    *,
    batch: int,
) -> tuple[Cost, ...]:
    def size(shape: tuple[int, ...]) -> int:
        """Entries of one sample; torch's blocks may take the positions before the samples."""
        return math.prod(shape) // batch if inside else math.prod(shape[1:])

    bill = _Bill(widths)
    for flops, slots in multiples.products:
        bill.add([(Part(slot, 1),) for slot in slots], flops, 0.0)
    billed: set[int] = set()
    for path, module in model.named_modules():
        site = sites.get(path)
        outputs = [site.outputs] if site else []
        sides = [*outputs, *([site.inputs] if site and site.inputs else [])]
        flops = 0.0
        inside = _within(model, path, READING)
        if isinstance(module, MULTIPLYING):
            flops = sum(2.0 * module.weight[0].numel() * size(s) for s in calls.outputs[path])
        elif isinstance(module, NORMALIZING):
            flops = sum(2.0 * size(s) for s in calls.outputs[path])
        bill.add([*sides, *((Part(slot, 1),) for slot in multiples.spread.get(path, ()))], flops, 0.0)
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in billed:
                continue
            billed.add(id(parameter))
            own = sites.get(_joined(path, name))
            # Vectors (biases, gains) go with the output channels alone, matrices with both sides.
            along = [own.outputs] if own else outputs if parameter.dim() == 1 else sides
            bill.add(along, 0.0, float(parameter.numel()))
    return bill.costs()


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
        unfit, own = _unfit(model, calls), _own_parameters(model)
        traced, refused = _traced(model)
        runs: list[Propagation] = []
        if traced is not None:
            runs.append(Propagation(traced, unfit | refused, own))
            runs[0].run(batch)
        for path in _islands(model, calls, tuple(refused)):
            reason = f"its channels leave {path} for code that cannot be traced"
            if isinstance(model.get_submodule(path), READING):
                runs.append(Propagation(_one_call(model, path), unfit, own, leaving=reason))
            else:
                inside, _ = _traced(model.get_submodule(path))
                runs.append(Propagation(cast("fx.GraphModule", inside), unfit, own, prefix=f"{path}.", leaving=reason))
            runs[-1].run(calls.arguments[path])
    slots: dict[str, WidthSlot] = {}
    sites: dict[str, Site] = {}
    multiples = _Multiples()
    for run in runs:
        names = _width_slots(model, run, slots, refused)
        sites |= _sites(model, run, names)
        multiples.products += [(product.flops, _slots_of(product.axes, run, names)) for product in run.products]
        multiples.spread |= {path: _slots_of(axes, run, names) for path, axes in run.spread.items()}
    widths = {name: slot.width for name, slot in slots.items()}
    shapes = {p: (calls.inputs[p][0][1:], calls.outputs[p][0][1:]) for p in calls.inputs if calls.count[p] == 1}
    costs = _costs(model, calls, sites, widths, multiples, batch=len(batch))
    read = frozenset(path for path in sites if _within(model, path, READING))
    return Analysis(slots, _span_slots(model, calls, sites), dict(refused), sites, shapes, costs, read)


def _within(model: nn.Module, path: str, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module of one of ``kinds`` holds what is at ``path``."""
    names = path.split(".")
    return any(isinstance(model.get_submodule(".".join(names[:end])), kinds) for end in range(len(names)))


def _one_call(model: nn.Module, path: str) -> fx.GraphModule:
    """A traced network that calls one module of ``model``'s and nothing else."""
    graph = fx.Graph()
    graph.output(graph.call_module(path, (graph.placeholder("values"),)))
    return fx.GraphModule(model, graph)


def _traced(model: nn.Module) -> tuple[fx.GraphModule | None, dict[str, str]]:
    attributes = set(model.__dict__)
    try:
        return _trace(model)
    finally:
        for name in set(model.__dict__) - attributes:  # fx leaves tensors that the code makes on the module
            delattr(model, name)


def _islands(model: nn.Module, calls: _Calls, opaque: Sequence[str]) -> list[str]:
    """The largest modules inside code that cannot be traced that can be traced themselves: each can grow inside.

    What calls them does not matter: they take a tensor and give a tensor of the same shape as before.
    """
    found: list[str] = []
    for path, module in model.named_modules():
        within = any(path.startswith(f"{outer}." if outer else "") and path != outer for outer in opaque)
        taken = any(path.startswith(f"{other}.") for other in found)
        small = not any(True for _ in module.children())
        if not path or not within or taken or small or path not in calls.arguments or calls.count[path] != 1:
            continue
        if isinstance(module, READING) or not _traced(module)[1]:
            found.append(path)
    return found


def _width_slots(
    model: nn.Module, run: Propagation, slots: dict[str, WidthSlot], refused: dict[str, str]
) -> dict[int, str]:
    """Add the slots that a run found to ``slots`` and ``refused``; returns their names by their set of variables."""
    for use in run.uses:
        if any(name.startswith(f"{use.path}.") for name in run.fetched):
            run.channels.pin((use.out_axis, use.in_axis), f"the model's code reads the weights of {use.path} itself")
    _choose_dimensions(run)
    members: dict[int, tuple[list[Use], list[Use], list[Use]]] = defaultdict(lambda: ([], [], []))
    for use in run.uses:
        for root in _roots(run, use.out_axis):
            members[root][1 if use.follower else 0].append(use)
        for root in _roots(run, use.in_axis):
            members[root][2].append(use)
    names: dict[int, str] = {}
    for root, (writers, followers, readers) in members.items():
        name = next((use.path for use in writers if use.operation is not Operation.PARAMETER), None)
        if name is None:
            continue  # a Parameter's channels that no layer writes
        reason = run.channels.pinned(root) or (None if readers else "nothing that can be widened reads its channels")
        if reason is not None:
            refused[name] = reason
            continue
        unit = run.channels.grain(root)
        width = cast("nn.Linear", model.get_submodule(name)).weight.shape[0] // unit
        names[root] = name
        blended = any(_blends(model, use) for use in followers)
        slots[name] = WidthSlot(name, width, _paths(writers), _paths(followers), _paths(readers), unit, blended)
    return names


def _paths(uses: Sequence[Use]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(use.path for use in uses))


def _roots(run: Propagation, axis: Axis | None) -> list[int]:
    pieces = axis.pieces if axis is not None else ()
    return list(dict.fromkeys(run.channels.find(p.variable) for p in pieces if p.variable is not None))


def _choose_dimensions(run: Propagation) -> None:
    """Keep of each Parameter's uses the one whose channels a layer writes too; with two of them it cannot grow."""
    layered = {
        root
        for use in run.uses
        if use.operation is not Operation.PARAMETER and not use.follower
        for root in _roots(run, use.out_axis)
        if run.channels.pinned(root) is None
    }
    chosen: dict[str, list[Use]] = defaultdict(list)
    for use in run.uses:
        if use.operation is Operation.PARAMETER and layered.intersection(_roots(run, use.out_axis)):
            chosen[use.path].append(use)
    for path, uses in chosen.items():
        if len(uses) > 1:
            run.channels.pin([use.out_axis for use in uses], f"{path} would grow in two dimensions")
    run.uses = [use for use in run.uses if use.operation is not Operation.PARAMETER or use in chosen[use.path]]


def _blends(model: nn.Module, use: Use) -> bool:
    if use.operation is Operation.GROUP_NORM:
        return cast("nn.GroupNorm", model.get_submodule(use.path)).num_groups == 1
    return use.operation in BLENDED


def _sites(model: nn.Module, run: Propagation, names: Mapping[int, str]) -> dict[str, Site]:
    sites: dict[str, Site] = {}

    def parts(axis: Axis) -> tuple[Part, ...]:
        found = []
        for piece in axis.pieces:
            slot = None if piece.variable is None else names.get(run.channels.find(piece.variable))
            if slot is None or piece.variable is None:
                found.append(Part(None, piece.size))
            else:
                found.append(Part(slot, int(piece.factor * run.channels.grain(piece.variable))))
        return tuple(found)

    for use in run.uses:
        outputs = parts(use.out_axis) if use.out_axis is not None else ()
        inputs = parts(use.in_axis) if use.in_axis is not None else ()
        if not any(part.slot for part in (*outputs, *inputs)):
            continue
        if not inputs and not use.follower and use.operation is not Operation.PARAMETER:
            inputs = (Part(None, cast("nn.Linear", model.get_submodule(use.path)).weight.shape[1]),)
        gain = use.follower and use.operation is Operation.PARAMETER
        sites[use.path] = Site(use.path, use.operation, outputs, inputs, use.dimension, gain)
    return sites


def _slots_of(axes: Sequence[Axis], run: Propagation, names: Mapping[int, str]) -> tuple[str, ...]:
    roots = [root for axis in axes for root in _roots(run, axis)]
    return tuple(names[root] for root in roots if root in names)


__all__ = ["Analysis", "Cost", "Part", "Site", "SpanSlot", "WidthSlot", "analyze", "undisturbed"]
