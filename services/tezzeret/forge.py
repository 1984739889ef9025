"""What a worker does with one job: build, compile, validate, characterise, pack. The only part that needs torch.

Runs in a worker process; everything that enters and leaves it is JSON or the bytes of a kernel.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, fx, nn

from services.blueprints import artifact, families
from services.blueprints.artifact import Characterization, Manifest
from services.blueprints.builder.branches import build_branch
from services.blueprints.builder.widening import Standin, widened_standins
from services.blueprints.digest import JsonValue
from services.blueprints.signature import interface_signature
from services.blueprints.spec import Blueprint, Interface, SlotKind, integer

BATCH: Final = 32
"""Samples of the batch that latency and memory are measured with."""
_REPEATS: Final = 9
_TOLERANCE: Final = 1e-5
"""Largest deviation of an output that stays the same, relative to its largest value: sums in another order."""


class ValidationError(Exception):
    """A kernel does not behave as its family promises; the message names the check."""


def forge(request: Mapping[str, JsonValue], stage: Callable[[str], None]) -> bytes:
    """The kernel of a request as a file.

    Args:
        request: ``blueprint`` and ``interface`` as JSON, ``size``, ``init_seed``, ``target``.
        stage: told the name of each stage as it begins.

    Raises:
        SpecError: The blueprint is unsound or does not fit the interface.
        ValidationError: The built modules do not behave as promised.
    """
    blueprint = Blueprint.from_json(request["blueprint"])
    interface = Interface.from_json(request["interface"])
    size = integer(request["size"], "size", 1, 2**16)
    seed = integer(request["init_seed"], "init_seed", 0, 2**63 - 1)
    family = families.check_fit(blueprint, interface, size)
    generator = torch.Generator().manual_seed(seed)
    stage("BUILDING")
    modules: list[tuple[nn.Module, tuple[int, ...]]]
    if interface.kind is SlotKind.WIDTH:
        standins = widened_standins(interface, size, blueprint.initialization.scale, seed)
        modules = [(standin.wide, standin.input_shape) for standin in standins]
        tensors: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    else:
        branch = build_branch(blueprint, interface, size, seed)
        modules = [(branch, families.entering_shape(family, interface))]
        tensors = {name: parameter.detach().numpy() for name, parameter in branch.named_parameters()}
    stage("COMPILING")
    # A static graph: no control flow that depends on data.
    graphs = [fx.symbolic_trace(nn.Sequential(module)) for module, _ in modules]
    stage("VALIDATING")
    batches = [torch.randn((BATCH, *shape), generator=generator) for _, shape in modules]
    for graph, (module, _), batch in zip(graphs, modules, batches, strict=True):
        _check_graph(graph, module, batch)
    if interface.kind is SlotKind.WIDTH:
        for standin, batch in zip(standins, batches, strict=True):
            _check_widening(standin, batch)
    else:
        _check_branch(branch, batches[0], interface)
        again = build_branch(blueprint, interface, size, seed)
        for name, parameter in again.named_parameters():
            if not np.array_equal(tensors[name], parameter.detach().numpy()):
                raise ValidationError(f"deterministic build: {name} differs between two builds with one seed")
    stage("CHARACTERIZING")
    manifest = Manifest(
        blueprint=blueprint,
        interface=interface,
        interface_signature=interface_signature(interface),
        size=size,
        seed=seed,
        characterization=Characterization(
            target=str(request["target"]),
            parameters=family.parameters(blueprint.parameters, interface, size),
            flops=family.flops(blueprint.parameters, interface, size),
            latency_seconds=_latency([module for module, _ in modules], batches),
            latency_batch=BATCH,
            memory_bytes=_kept_bytes([module for module, _ in modules], batches),
        ),
    )
    return artifact.pack(manifest, tensors)


def _check_graph(graph: fx.GraphModule, module: nn.Module, batch: Tensor) -> None:
    """What was traced is what was built. In evaluation mode: running statistics stay as they are."""
    module.eval()
    with torch.no_grad():
        if not torch.equal(graph(batch), module(batch)):
            raise ValidationError("static graph: the traced module gives another output")
    module.train()


def _check_widening(standin: Standin, batch: Tensor) -> None:
    """Old outputs stay what they were; everything is finite and learns."""
    path = standin.interface.path
    standin.narrow.eval()
    standin.wide.eval()
    with torch.no_grad():
        before = standin.narrow(standin.old_inputs(batch))
        after = standin.wide(batch)[:, : before.shape[1]]
    deviation = float((after - before).abs().max() / before.abs().max().clamp_min(1e-12))
    if not deviation <= _TOLERANCE:
        raise ValidationError(f"function-preserving: the output of {path} changes by {deviation:.2g}")
    standin.wide.train()
    _check_gradients(standin.wide, batch, path)


def _check_branch(branch: nn.Module, batch: Tensor, interface: Interface) -> None:
    """The output has the span's shape; everything is finite and learns."""
    found = tuple(branch(batch).shape[1:])
    if found != interface.output_shape:
        raise ValidationError(f"output shape: the branch gives {list(found)}, the span {list(interface.output_shape)}")
    _check_gradients(branch, batch, "branch")


def _check_gradients(module: nn.Module, batch: Tensor, path: str) -> None:
    output = module(batch)
    (output * torch.linspace(-1.0, 1.0, output.numel()).reshape(output.shape)).sum().backward()
    if not output.isfinite().all():
        raise ValidationError(f"finite outputs: those of {path} are not")
    for name, parameter in module.named_parameters():
        if parameter.grad is None or not parameter.grad.isfinite().all():
            raise ValidationError(f"finite gradients: that of {path}.{name} is not")
        parameter.grad = None


def _latency(modules: list[nn.Module], batches: list[Tensor]) -> float:
    """Median seconds of one forward pass through all modules, after one pass to warm up."""
    seconds = []
    with torch.no_grad():
        for _ in range(_REPEATS + 1):
            started = time.perf_counter()
            for module, batch in zip(modules, batches, strict=True):
                module(batch)
            seconds.append(time.perf_counter() - started)
    return median(seconds[1:])


def _kept_bytes(modules: list[nn.Module], batches: list[Tensor]) -> int:
    """Bytes a forward and backward pass of all modules keeps: activations saved for the backward pass, and gradients.

    Counted by autograd's own hooks, each storage once; a dispatch mode would see temporaries too, but loads the whole
    compiler stack (4 s).
    """
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        losses = [module(batch).square().mean() for module, batch in zip(modules, batches, strict=True)]
    torch.autograd.backward(losses)
    gradients = 0
    for module in modules:
        gradients += sum(parameter.grad.nbytes for parameter in module.parameters() if parameter.grad is not None)
        module.zero_grad()
    return sum(saved.values()) + gradients
