"""Hands the grown network back as plain PyTorch: weights, a table of what changed, and the file that rebuilds it.

``weights.safetensors``   state dict of the grown network
``growth.json``           what it began as and what changed: layer, operation, shape before and after
``rebuild.py``            stand-alone: applies the table to an instance of the host's class (torch only)
``model.py``              the built-in hosts in plain PyTorch, where the run used one
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import safetensors.torch
from torch import Tensor, nn

from services.chassis.config.schema import ModelConfig
from services.kasmina.branches import Bridge
from services.kasmina.engine import GrowthEngine
from services.tolaria import hosts, rebuild
from services.tolaria.data.splits import DataSet
from services.tolaria.errors import ExportError

FORMAT_VERSION: Final = 1


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


def export(engine: GrowthEngine, folder: Path, config: ModelConfig, data: DataSet) -> Path:
    """Write the export of the engine's network (no seed under way) into ``folder``; returns it.

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
        "changes": changes(engine),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(weights(engine.model), folder / "weights.safetensors")
        (folder / "growth.json").write_text(json.dumps(growth, indent=1) + "\n", encoding="utf-8")
        shutil.copyfile(rebuild.__file__, folder / "rebuild.py")
        if config.name != "factory":
            shutil.copyfile(hosts.__file__, folder / "model.py")
    except OSError as error:
        raise ExportError(f"the export to {folder} was not written: {error.strerror}") from error
    return folder
