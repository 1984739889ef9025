"""The kernels of a run: verified on the way in, cached, and kept in the run folder so that a resume needs no mesh."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.blueprints.artifact import ArtifactError, Kernel
from services.chassis.errors import EsperError
from services.chassis.files import write_atomically
from services.kasmina.kernel_cache import CacheStats, KernelCache
from services.tolaria.ports import KernelFile, KernelUnavailableError


class KernelShelf:
    """Thread-safe: the mesh thread admits, the training thread takes."""

    def __init__(self, folder: Path, cache: KernelCache, public_key: Ed25519PublicKey) -> None:
        self._folder = folder
        self._cache = cache
        self._public_key = public_key

    def admit(self, file: KernelFile) -> str:
        """Verify ``file`` and keep it; returns its digest. Raises KernelUnavailableError for one that is not genuine.

        The signature is verified before a byte is parsed or written.
        """
        digest = bytes.fromhex(file.digest)
        try:
            self._cache.put(file.data, digest, file.signature, self._public_key)
        except ArtifactError as error:
            raise KernelUnavailableError(f"the kernel {file.digest[:12]} was refused: {error}") from error
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # The signature first: a kernel file is only looked for once both are there.
            write_atomically(self._folder / f"{file.digest}.signature", file.signature)
            write_atomically(self._folder / f"{file.digest}.safetensors", file.data)
        except (OSError, EsperError) as error:
            # A kernel that a resume would not find must not get into the network.
            raise KernelUnavailableError(f"the kernel {file.digest[:12]} cannot be kept: {error}") from error
        return file.digest

    def take(self, digest: str) -> Kernel:
        """The kernel ``digest`` (hex): from the cache, or from the run folder, verified again.

        Raises KernelUnavailableError when it is gone or no longer genuine.
        """
        kernel = self._cache.get(bytes.fromhex(digest))
        if kernel is not None:
            return kernel
        try:
            data = (self._folder / f"{digest}.safetensors").read_bytes()
            signature = (self._folder / f"{digest}.signature").read_bytes()
            return self._cache.put(data, bytes.fromhex(digest), signature, self._public_key)
        except (OSError, ArtifactError) as error:
            raise KernelUnavailableError(
                f"the kernel {digest[:12]} is not in the run folder any more: {error}"
            ) from error

    def stats(self) -> CacheStats:
        """Figures of the cache."""
        return self._cache.stats()
