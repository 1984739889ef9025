"""Hands the grown network back as plain PyTorch: weights, a table of what changed, and the file that rebuilds it.

``weights.safetensors``   state dict of the grown network
``growth.json``           what it began as, what changed (layer, operation, shape before and after), how its inputs are
                          normalized, and the digest of every other file
``rebuild.py``            stand-alone: applies the table to an instance of the host's class (torch only)
``model.py``              the built-in hosts in plain PyTorch, where the run used one

What else is asked for is made of these files by :mod:`services.tolaria.exporting`.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import safetensors.torch
import torch
from torch import Tensor, nn

from services.chassis.config.schema import ModelConfig
from services.chassis.errors import EsperError
from services.chassis.files import write_atomically
from services.kasmina.branches import Bridge
from services.kasmina.engine import GrowthEngine
from services.tolaria import hosts, rebuild
from services.tolaria.data.splits import DataSet
from services.tolaria.errors import ExportError

FORMAT_VERSION: Final = 1
GROWTH_FILE: Final = "growth.json"
#: How far outputs may lie from the network's own, as a share of its largest output on the same batch (float32).
TOLERANCE: Final = 1e-4
#: Images of the validation set that a rebuilt network is compared on.
_CHECKED_IMAGES: Final = 32
_INPUT: Final = "input"
_OUTPUT: Final = "output"


@dataclass(frozen=True, slots=True)
class ExportedFile:
    """One file of an export: its name, its length, its SHA-256 in hexadecimal."""

    name: str
    bytes: int
    sha256: str


def changes(engine: GrowthEngine) -> list[dict[str, Any]]:
    """What growth changed, as :mod:`services.tolaria.rebuild` reads it."""
    return [asdict(change) for change in engine.growth_table()]


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a grown network in plain PyTorch's terms: copies, without the alpha of settled branches."""
    alphas = {f"{name}.alpha" for name, module in model.named_modules() if isinstance(module, Bridge)}
    return {
        name: tensor.detach().cpu().contiguous().clone()
        for name, tensor in model.state_dict().items()
        if name not in alphas
    }


def export(engine: GrowthEngine, folder: Path, config: ModelConfig, data: DataSet) -> list[ExportedFile]:
    """Write the export of the engine's network (no seed under way) into ``folder``; returns its files.

    Raises ExportError when it cannot be written.
    """
    growth = {
        "format_version": FORMAT_VERSION,
        "host": {
            "name": config.name,
            "factory": config.factory,
            "widths": config.widths if config.name != "factory" else None,
            "input_shape": list(data.input_shape),
            "classes": data.classes,
        },
        "normalization": {
            "mean": data.normalization.mean.flatten().tolist(),
            "deviation": data.normalization.deviation.flatten().tolist(),
        },
        "input": {"name": _INPUT, "dtype": "float32", "shape": ["batch", *data.input_shape]},
        "output": {"name": _OUTPUT, "dtype": "float32", "shape": ["batch", data.classes]},
        "changes": changes(engine),
        "files": {},
    }
    names = ["weights.safetensors", "rebuild.py"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Not save_file: what it raises on a full disk is no OSError.
        (folder / "weights.safetensors").write_bytes(safetensors.torch.save(weights(engine.model)))
        shutil.copyfile(rebuild.__file__, folder / "rebuild.py")
        if config.name != "factory":
            shutil.copyfile(hosts.__file__, folder / "model.py")
            names.append("model.py")
        (folder / GROWTH_FILE).write_text(json.dumps(growth, indent=1) + "\n", encoding="utf-8")
        return record_files(folder, names)
    except OSError as error:
        raise ExportError(f"the export to {folder} was not written: {error.strerror}") from error


def record_files(folder: Path, names: Iterable[str]) -> list[ExportedFile]:
    """Add files that are there to the ``files`` of ``growth.json``; returns them.

    Raises OSError for a file that cannot be read, ExportError when ``growth.json`` cannot be written.
    """
    files = []
    for name in names:
        with (folder / name).open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        files.append(ExportedFile(name, (folder / name).stat().st_size, digest))
    growth = json.loads((folder / GROWTH_FILE).read_text(encoding="utf-8"))
    growth["files"].update({file.name: {"bytes": file.bytes, "sha256": file.sha256} for file in files})
    try:
        write_atomically(folder / GROWTH_FILE, json.dumps(growth, indent=1) + "\n")
    except EsperError as error:
        raise ExportError(error.message) from error
    return files


def check_rebuild(model: nn.Module, folder: Path, host: nn.Module, data: DataSet) -> float:
    """Rebuild the network from ``folder`` and compare it with ``model``, the trained one; returns their difference.

    ``host`` is a fresh instance of the class that growth began with, drawn from other random numbers than the run's,
    so that everything that is not in the weights shows; it is grown in place.
    Raises ExportError when it cannot be rebuilt, or puts out something else.
    """
    images = data.normalization(data.validation.images[:_CHECKED_IMAGES])
    was_training = model.training
    try:
        rebuilt = rebuild.load(host, folder).to(images.device)
        return check_outputs(rebuilt, model.eval(), [images])
    except ExportError as error:
        raise ExportError(
            f"what is rebuilt from {folder} is not the network that was trained: {error.message}; a network is "
            "rebuilt from its class and its state dict, so random tensors have to be persistent buffers of it"
        ) from error
    except Exception as error:  # a network of the user's is built and run here: it may raise anything
        raise ExportError(
            f"the export in {folder} does not rebuild the network: {type(error).__name__}: {error}"
        ) from error
    finally:
        model.train(was_training)


def check_outputs(found: Callable[[Tensor], Tensor], model: nn.Module, batches: Iterable[Tensor]) -> float:
    """The largest difference of ``found`` from ``model``, as a share of the model's largest output on that batch.

    Raises ExportError when it is above :data:`TOLERANCE`.
    """
    largest = 0.0
    for batch in batches:
        with torch.no_grad():
            expected, outputs = model(batch), found(batch)
        if outputs.shape != expected.shape:
            raise ExportError(f"it puts out {tuple(outputs.shape)}, not {tuple(expected.shape)}")
        scale = expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)
        difference = float((outputs - expected).abs().max() / scale)
        # Not the other way round: NaN is no equality.
        if not difference <= TOLERANCE:
            raise ExportError(f"its outputs differ by {difference:.2g} of the largest one, {TOLERANCE:g} is allowed")
        largest = max(largest, difference)
    return largest
