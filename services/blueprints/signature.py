"""Who vouches for a kernel: Ed25519 signatures (RFC 8032) over its digest, and what an interface looks like.

The private key is Tezzeret's; everybody else has the public one. Key files are PEM, mode 0600.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from services.blueprints.digest import DIGEST_BYTES, JsonValue, canonical_json, sha256
from services.blueprints.spec import Interface, LayerInterface

PRIVATE_KEY_FILE = "tezzeret.key"
PUBLIC_KEY_FILE = "tezzeret.pub"
SIGNATURE_BYTES = 64

# Says what is signed, so that a signature over a kernel can never pass for one over something else.
_CONTEXT = b"esper.kernel.v1\0"
_STATUS_CONTEXT = b"esper.kernel-status.v1\0"


class SignatureError(ValueError):
    """A signature does not vouch for the digest, or a key file is missing or unreadable."""


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A private key and its public half.

    Attributes:
        private_key: Signs.
        public_key: Verifies.
    """

    private_key: Ed25519PrivateKey
    public_key: Ed25519PublicKey


def generate_keypair(directory: Path) -> KeyPair:
    """The key pair of ``directory``, made there if it has none. Safe to call twice, and from two processes.

    Raises:
        OSError: The files cannot be written.
        SignatureError: A private key is there but unreadable.
    """
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    path = directory / PRIVATE_KEY_FILE
    if not path.exists():
        pem = Ed25519PrivateKey.generate().private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        _install(path, pem)
    private_key = load_private_key(directory)
    public_key = private_key.public_key()
    if not (directory / PUBLIC_KEY_FILE).exists():
        pem = public_key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        _install(directory / PUBLIC_KEY_FILE, pem)
    return KeyPair(private_key, public_key)


def load_private_key(directory: Path) -> Ed25519PrivateKey:
    """The private key of ``directory``.

    Raises:
        SignatureError: It is missing, unreadable or no Ed25519 key.
    """
    path = directory / PRIVATE_KEY_FILE
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"cannot read the private key {path.name}: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise SignatureError(f"{path.name} is no Ed25519 private key")
    return key


def load_public_key(directory: Path) -> Ed25519PublicKey:
    """The public key of ``directory``.

    Raises:
        SignatureError: It is missing, unreadable or no Ed25519 key.
    """
    path = directory / PUBLIC_KEY_FILE
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise SignatureError(f"cannot read the public key {path.name}: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise SignatureError(f"{path.name} is no Ed25519 public key")
    return key


def sign(private_key: Ed25519PrivateKey, digest: bytes) -> bytes:
    """Signature over a kernel's digest, 64 bytes.

    Args:
        private_key: Who vouches.
        digest: SHA-256 of the kernel's file, 32 bytes.
    """
    return private_key.sign(_CONTEXT + digest)


def verify(public_key: Ed25519PublicKey, digest: bytes, signature: bytes) -> None:
    """Return if ``signature`` vouches for ``digest``.

    Raises:
        SignatureError: It does not.
    """
    _verify(public_key, _CONTEXT, digest, b"", signature)


def attest_status(private_key: Ed25519PrivateKey, digest: bytes, status: str) -> bytes:
    """The validator's word on a kernel, 64 bytes: the ``attestation`` of Urza's SetKernelStatus.

    Args:
        private_key: The key that signs kernels.
        digest: SHA-256 of the kernel's file, 32 bytes.
        status: As in the contract without its prefix: ``VALIDATED``, ``REJECTED`` or ``RETIRED``.
    """
    return private_key.sign(_STATUS_CONTEXT + digest + status.encode())


def verify_status(public_key: Ed25519PublicKey, digest: bytes, status: str, attestation: bytes) -> None:
    """Return if ``attestation`` is the validator's word that the kernel has this status.

    Raises:
        SignatureError: It is not.
    """
    _verify(public_key, _STATUS_CONTEXT, digest, status.encode(), attestation)


def _verify(public_key: Ed25519PublicKey, context: bytes, digest: bytes, more: bytes, signature: bytes) -> None:
    # Of fixed length, else bytes could move between the digest and what follows it.
    if len(digest) != DIGEST_BYTES:
        raise SignatureError(f"a digest has {DIGEST_BYTES} bytes, this one {len(digest)}")
    try:
        public_key.verify(signature, context + digest + more)
    except InvalidSignature:
        raise SignatureError("the signature does not vouch for this kernel") from None


def interface_signature(interface: Interface) -> str:
    """SHA-256 (hex) of all a kernel depends on: kind, shapes, element type, layers with their operations and shapes.

    Module paths are left out: a kernel fits every place that looks the same. That a layer both writes and reads is
    kept, by the positions of such pairs.
    """
    writers = {layer.path: index for index, layer in enumerate(interface.writers)}
    value: dict[str, JsonValue] = {
        "version": 1,
        "kind": interface.kind.value,
        "input_shape": list(interface.input_shape),
        "output_shape": list(interface.output_shape),
        "dtype": interface.dtype,
        "writers": [_anonymous(layer) for layer in interface.writers],
        "readers": [_anonymous(layer) for layer in interface.readers],
        "followers": [_anonymous(layer) for layer in interface.followers],
        "both": [
            [writers[layer.path], index] for index, layer in enumerate(interface.readers) if layer.path in writers
        ],
    }
    return sha256(canonical_json(value)).hex()


def _anonymous(layer: LayerInterface) -> dict[str, JsonValue]:
    return {name: value for name, value in layer.to_json().items() if name != "path"}


def _install(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` with mode 0600 unless it exists; nobody ever sees half a key."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, path)  # unlike rename it does not replace what another process put there first
    except FileExistsError:
        pass  # theirs is as good as ours, and it is the one both will load
    finally:
        temporary.unlink()
