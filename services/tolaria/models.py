"""Host networks from the configuration: the built-in ones or a user's own class, always from the same private draw."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from services.chassis.config.schema import ModelConfig
from services.tolaria import hosts
from services.tolaria.data.splits import DataSet
from services.tolaria.errors import FactoryError, ModelError
from services.tolaria.factories import load_factory
from services.tolaria.seeds import derive

#: Training images that the whitening stem is fitted on.
_WHITENING_IMAGES = 2000


def build_host(config: ModelConfig, data: DataSet, seed: int) -> nn.Module:
    """A fresh host for ``data``; equal arguments give equal weights, and the global generator is left as it was.

    ``seed`` is the run's root seed. Raises ModelError or FactoryError.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "initialization"))
        model = _from_factory(config, data) if config.name == "factory" else _built_in(config, data)
    if config.weights is not None:
        load_weights(model, config.weights)
    return model


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a trained checkpoint of the host: safetensors, or a state dict read with ``weights_only``.

    Raises ModelError naming the file, and the tensors that do not fit.
    """
    try:
        if path.suffix == ".safetensors":
            weights: dict[str, Tensor] = safetensors.torch.load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(weights)
    except Exception as error:  # torch refuses a file with errors of a module that nobody here may import
        raise ModelError(f"model.weights {path} does not fit this host: {error}") from error


def _built_in(config: ModelConfig, data: DataSet) -> nn.Module:
    try:
        model = hosts.build(config.name, data.input_shape, data.classes, config.widths)
    except ValueError as error:
        raise ModelError(f"model: {error}") from error
    for module in model.modules():
        if isinstance(module, hosts.WhiteningStem):
            module.fit(data.normalization(data.training.images[:_WHITENING_IMAGES]).cpu())
    return model


def _from_factory(config: ModelConfig, data: DataSet) -> nn.Module:
    assert config.factory is not None, "the configuration refuses name: factory without one"
    model = load_factory(config.factory, "model.factory")(data.input_shape, data.classes)
    if not isinstance(model, nn.Module):
        raise FactoryError(f"model.factory {config.factory} returned a {type(model).__name__}, not a torch.nn.Module")
    example = data.normalization(data.training.images[:2])
    training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(example)
    except Exception as error:
        raise FactoryError(
            f"model.factory {config.factory}: the network failed on a batch of {tuple(example.shape)}: "
            f"{type(error).__name__}: {error}"
        ) from error
    model.train(training)
    if not isinstance(logits, Tensor) or logits.shape != (2, data.classes):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise FactoryError(f"model.factory {config.factory}: the network puts out {shape}, not (2, {data.classes})")
    return model
