"""Kernels as files: pack, verify, unpack.

A kernel is one safetensors file. Its ``__metadata__["esper"]`` is the canonical JSON of its manifest. Its identity is
the SHA-256 of the file; Tezzeret signs that digest. :func:`verify` needs no parsing and comes first, always; what a
stranger changed is never looked at. Parsing is bounded all the same.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.blueprints import signature as signatures
from services.blueprints.digest import DIGEST_BYTES, JsonValue, canonical_json, sha256
from services.blueprints.spec import (
    MAX_NAME_CHARACTERS,
    MAX_SEED,
    MAX_SIZE,
    Blueprint,
    InitRecipe,
    Interface,
    Scalar,
    SpecError,
    integer,
    number,
)

if TYPE_CHECKING:
    import numpy as np

# numpy and safetensors are imported where they are used: a service starts a fifth of a second sooner without them.

FORMAT_VERSION = 1
MAX_ARTIFACT_BYTES = 256 * 2**20
"""Largest kernel: 256 MiB."""
MAX_HEADER_BYTES = 2**20
"""Largest header, manifest included: 1 MiB."""
MAX_TENSORS = 256
_METADATA_KEY = "esper"


class ArtifactError(ValueError):
    """Bytes that are no kernel, or not the kernel that was promised."""


class DigestMismatchError(ArtifactError):
    """The bytes are not those the digest names."""


class KernelSignatureError(ArtifactError):
    """Nobody trusted vouches for the bytes."""


class MalformedKernelError(ArtifactError):
    """The bytes are no kernel of a format this version reads."""


@dataclass(frozen=True, slots=True)
class Characterization:
    """What a kernel costs. ``None`` was not measured.

    Attributes:
        target: Where it was measured and is meant to run, e.g. ``cpu``.
        parameters: Parameters it adds.
        flops: Forward FLOPs per sample it adds (2 per multiply-add).
        latency_seconds: Median forward pass of one batch.
        latency_batch: Samples of that batch.
        memory_bytes: What a forward and backward pass of that batch keeps: saved activations and gradients.
    """

    target: str
    parameters: int
    flops: int | None = None
    latency_seconds: float | None = None
    latency_batch: int | None = None
    memory_bytes: int | None = None

    def to_json(self) -> dict[str, JsonValue]:
        """As JSON; :meth:`from_json` is the inverse."""
        return {
            "target": self.target,
            "parameters": self.parameters,
            "flops": self.flops,
            "latency_seconds": self.latency_seconds,
            "latency_batch": self.latency_batch,
            "memory_bytes": self.memory_bytes,
        }

    @classmethod
    def from_json(cls, value: JsonValue, where: str = "characterization") -> Self:
        """From JSON.

        Raises:
            SpecError: A field is missing, unknown, of the wrong type or out of range.
        """
        names = ("target", "parameters", "flops", "latency_seconds", "latency_batch", "memory_bytes")
        fields = _fields(value, where, names)
        latency = fields["latency_seconds"]
        return cls(
            target=_name(fields["target"], f"{where}.target"),
            parameters=integer(fields["parameters"], f"{where}.parameters", 0, MAX_SEED),
            flops=_optional_count(fields["flops"], f"{where}.flops"),
            latency_seconds=None if latency is None else number(latency, f"{where}.latency_seconds"),
            latency_batch=_optional_count(fields["latency_batch"], f"{where}.latency_batch"),
            memory_bytes=_optional_count(fields["memory_bytes"], f"{where}.memory_bytes"),
        )


@dataclass(frozen=True)
class Manifest:
    """What a kernel says about itself.

    Attributes:
        blueprint: The design it was compiled from; carried whole, so that a kernel explains itself.
        interface: The place it was compiled for.
        interface_signature: :func:`services.blueprints.signature.interface_signature` of it.
        size: New channels of a widening, inner width of a branch.
        seed: Seed of the private generator that draws newborn weights, 0..2**63-1.
        characterization: What it costs.
    """

    blueprint: Blueprint
    interface: Interface
    interface_signature: str
    size: int
    seed: int
    characterization: Characterization

    @property
    def family(self) -> str:
        """Family of the blueprint."""
        return self.blueprint.family

    @property
    def parameters(self) -> Mapping[str, Scalar]:
        """Parameters of the blueprint."""
        return self.blueprint.parameters

    @property
    def initialization(self) -> InitRecipe:
        """How newborn weights are drawn, apart from the seed."""
        return self.blueprint.initialization

    @property
    def target(self) -> str:
        """Where it is meant to run."""
        return self.characterization.target

    def to_json(self) -> dict[str, JsonValue]:
        """As JSON; :meth:`from_json` is the inverse."""
        return {
            "format_version": FORMAT_VERSION,
            "blueprint_digest": self.blueprint.digest.hex(),
            "family": self.family,
            "parameters": dict(self.parameters),
            "initialization": {**self.initialization.to_json(), "seed": self.seed},
            "interface": self.interface.to_json(),
            "interface_signature": self.interface_signature,
            "size": self.size,
            "characterization": self.characterization.to_json(),
        }

    @classmethod
    def from_json(cls, value: JsonValue, where: str = "manifest") -> Self:
        """From JSON. The digests in it must fit what they name.

        Raises:
            SpecError: A field is missing, unknown, of the wrong type, out of range, or contradicts another.
        """
        if not isinstance(value, dict):
            raise SpecError(where, "must be an object")
        if value.get("format_version") != FORMAT_VERSION or value["format_version"] is True:
            raise SpecError(f"{where}.format_version", f"this version reads {FORMAT_VERSION} only")
        names = (
            *("format_version", "blueprint_digest", "family", "parameters", "initialization", "interface"),
            *("interface_signature", "size", "characterization"),
        )
        fields = _fields(value, where, names)
        recipe = fields["initialization"]
        if not isinstance(recipe, dict):
            raise SpecError(f"{where}.initialization", "must be an object")
        blueprint = Blueprint.from_json(
            {
                "family": fields["family"],
                "parameters": fields["parameters"],
                "initialization": {name: item for name, item in recipe.items() if name != "seed"},
            },
            where,
        )
        if fields["blueprint_digest"] != blueprint.digest.hex():
            raise SpecError(f"{where}.blueprint_digest", "is not that of the family, parameters and initialization")
        interface = Interface.from_json(fields["interface"], f"{where}.interface")
        expected = signatures.interface_signature(interface)
        if fields["interface_signature"] != expected:
            raise SpecError(f"{where}.interface_signature", "is not that of the interface")
        return cls(
            blueprint=blueprint,
            interface=interface,
            interface_signature=expected,
            size=integer(fields["size"], f"{where}.size", 1, MAX_SIZE),
            seed=integer(recipe.get("seed"), f"{where}.initialization.seed", 0, MAX_SEED),
            characterization=Characterization.from_json(fields["characterization"], f"{where}.characterization"),
        )


@dataclass(frozen=True)
class Kernel:
    """A compiled blueprint.

    Attributes:
        manifest: What it is.
        tensors: Initial weights (float32) of a branch by name, shapes as the family's layers have them; a widening
            has none.
    """

    manifest: Manifest
    tensors: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]


def pack(manifest: Manifest, tensors: Mapping[str, np.ndarray[Any, np.dtype[np.float32]]]) -> bytes:
    """The file of a kernel. Equal kernels give equal bytes.

    Raises:
        MalformedKernelError: It would be beyond the bounds, or a tensor is not float32.
    """
    import numpy as np
    import safetensors.numpy

    if len(tensors) > MAX_TENSORS:
        raise MalformedKernelError(f"a kernel has at most {MAX_TENSORS} tensors, not {len(tensors)}")
    for name, tensor in tensors.items():
        if tensor.dtype != np.float32:
            raise MalformedKernelError(f"tensor {name!r} is {tensor.dtype}, not float32")
    if sum(tensor.nbytes for tensor in tensors.values()) > MAX_ARTIFACT_BYTES - MAX_HEADER_BYTES:
        raise MalformedKernelError(f"a kernel has at most {MAX_ARTIFACT_BYTES} bytes")
    text = canonical_json(manifest.to_json())
    if len(text) > MAX_HEADER_BYTES // 4:  # in the header its quotes are escaped, and the tensors' table comes on top
        raise MalformedKernelError(f"the manifest has {len(text)} bytes, more than {MAX_HEADER_BYTES // 4}")
    contiguous = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return safetensors.numpy.save(contiguous, {_METADATA_KEY: text.decode()})


def verify_digest(data: bytes, digest: bytes) -> None:
    """Return if ``data`` is what ``digest`` (SHA-256, 32 bytes) names: the cheap half of :func:`verify`.

    Raises:
        DigestMismatchError: The bytes are not those the digest names.
    """
    if len(digest) != DIGEST_BYTES:
        raise DigestMismatchError(f"a digest has {DIGEST_BYTES} bytes, this one {len(digest)}")
    found = sha256(data)
    if found != digest:
        raise DigestMismatchError(f"the kernel's digest is {found.hex()}, promised was {digest.hex()}")


def verify(data: bytes, digest: bytes, signature: bytes, public_key: Ed25519PublicKey) -> None:
    """Return if ``data`` is what ``digest`` names and the holder of the key vouches for it. Parses nothing.

    Args:
        data: The file.
        digest: SHA-256 that was promised, 32 bytes.
        signature: Ed25519 over the digest, 64 bytes.
        public_key: Whom we trust.

    Raises:
        DigestMismatchError: The bytes are not those the digest names.
        KernelSignatureError: The signature does not vouch for them.
    """
    verify_digest(data, digest)
    try:
        signatures.verify(public_key, digest, signature)
    except signatures.SignatureError as error:
        raise KernelSignatureError(str(error)) from error


def unpack(data: bytes) -> Kernel:
    """The kernel in a file that has been verified. Bounded and typed all the same, whatever the bytes.

    Raises:
        MalformedKernelError: The bytes are no kernel; the message names the field.
    """
    import numpy as np
    import safetensors
    import safetensors.numpy

    if len(data) > MAX_ARTIFACT_BYTES:
        raise MalformedKernelError(f"{len(data)} bytes are more than the {MAX_ARTIFACT_BYTES} of a kernel")
    header = _header(data)
    metadata = header.pop("__metadata__", None)
    text = metadata.get(_METADATA_KEY) if isinstance(metadata, dict) else None
    if not isinstance(text, str):
        raise MalformedKernelError("no manifest in the metadata")
    if len(header) > MAX_TENSORS:
        raise MalformedKernelError(f"{len(header)} tensors are more than {MAX_TENSORS}")
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.get("dtype") != "F32":
            raise MalformedKernelError(f"tensor {name[:64]!r} is not float32")
    try:
        manifest = Manifest.from_json(_parse(text))
    except SpecError as error:
        raise MalformedKernelError(str(error)) from error
    try:
        tensors = safetensors.numpy.load(data)
    except (safetensors.SafetensorError, ValueError) as error:
        raise MalformedKernelError(f"no safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if not np.isfinite(tensor).all():
            raise MalformedKernelError(f"tensor {name[:64]!r} holds a value that is not finite")
    return Kernel(manifest, tensors)


def open_verified(data: bytes, digest: bytes, signature: bytes, public_key: Ed25519PublicKey) -> Kernel:
    """:func:`verify`, then :func:`unpack`: the way in for bytes from elsewhere.

    Raises:
        ArtifactError: As those two do.
    """
    verify(data, digest, signature, public_key)
    return unpack(data)


def _header(data: bytes) -> dict[str, JsonValue]:
    if len(data) < 8:
        raise MalformedKernelError(f"{len(data)} bytes are too few for a kernel")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        raise MalformedKernelError(f"the header claims {length} bytes")
    value = _parse(data[8 : 8 + length])
    if not isinstance(value, dict):
        raise MalformedKernelError("the header is no object")
    return value


def _parse(text: str | bytes) -> JsonValue:
    try:
        value: JsonValue = json.loads(text, parse_constant=_refuse_constant, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        raise MalformedKernelError(f"no JSON: {error}") from error
    return value


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number is beyond the range of a double")
    return value


def _fields(value: JsonValue, where: str, names: tuple[str, ...]) -> dict[str, JsonValue]:
    if not isinstance(value, dict) or set(value) != set(names):
        raise SpecError(where, f"must be an object of exactly {', '.join(names)}")
    return value


def _name(value: JsonValue, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME_CHARACTERS or not value.isprintable():
        raise SpecError(where, f"must be text of 1..{MAX_NAME_CHARACTERS} printable characters")
    return value


def _optional_count(value: JsonValue, where: str) -> int | None:
    return None if value is None else integer(value, where, 0, MAX_SEED)
