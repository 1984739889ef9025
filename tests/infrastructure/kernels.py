"""Small, real kernels for tests: built, packed and signed as Tezzeret does it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from services.blueprints import artifact, families, signature
from services.blueprints.digest import sha256
from services.blueprints.spec import Blueprint, Interface, LayerInterface, SlotKind
from services.blueprints.vocabulary import Operation

SPAN = Interface(SlotKind.SPAN, (8, 4, 4), (8, 4, 4))
WIDTH = Interface(
    SlotKind.WIDTH,
    (3, 8, 8),
    (8, 8, 8),
    writers=(LayerInterface("conv1", Operation.CONV2D, (8, 3, 3, 3), (8, 8, 8)),),
    followers=(LayerInterface("norm1", Operation.BATCH_NORM2D, (8,), (8, 8, 8)),),
    readers=(
        LayerInterface("conv2", Operation.CONV2D, (16, 8, 3, 3), (16, 4, 4), bias=True),
        LayerInterface("head", Operation.LINEAR, (10, 8 * 64), (10,), bias=True),
    ),
)
_BUILTIN = {blueprint.family: blueprint for blueprint in families.builtin_blueprints()}
WIDEN, BOTTLENECK = _BUILTIN["widen"], _BUILTIN["residual_bottleneck"]


@dataclass(frozen=True)
class SignedKernel:
    """A kernel as it travels."""

    manifest: artifact.Manifest
    data: bytes
    digest: bytes
    signature: bytes

    @property
    def id(self) -> str:
        """Its resource id."""
        return self.digest.hex()[:32]


def signed_kernel(
    keys: Path,
    *,
    blueprint: Blueprint = BOTTLENECK,
    interface: Interface = SPAN,
    size: int = 2,
    seed: int = 0,
    target: str = "cpu",
    latency_seconds: float | None = None,
    memory_bytes: int | None = None,
) -> SignedKernel:
    """A kernel signed with the key of the folder ``keys``, which is made if need be."""
    family = families.check_fit(blueprint, interface, size)
    generator = np.random.default_rng(seed)
    layers = family.layers(blueprint.parameters, interface, size)
    manifest = artifact.Manifest(
        blueprint,
        interface,
        signature.interface_signature(interface),
        size,
        seed,
        artifact.Characterization(
            target=target,
            parameters=family.parameters(blueprint.parameters, interface, size),
            flops=family.flops(blueprint.parameters, interface, size),
            latency_seconds=latency_seconds,
            latency_batch=None if latency_seconds is None else 32,
            memory_bytes=memory_bytes,
        ),
    )
    data = artifact.pack(
        manifest,
        {
            name: generator.standard_normal(shape).astype(np.float32)
            for layer in layers
            for name, shape in layer.tensor_shapes().items()
        },
    )
    digest = sha256(data)
    return SignedKernel(manifest, data, digest, signature.sign(signature.generate_keypair(keys).private_key, digest))
