"""The kernels of a run at hand: cached, kept in the run folder, and verified before they are parsed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.blueprints.artifact import ArtifactError, Kernel
from services.kasmina.kernel_cache import CacheStats, KernelCache
from services.tolaria.kernel_files import KernelFiles
from services.tolaria.ports import KernelFile, KernelUnavailableError


class KernelShelf:
    """Thread-safe: the training thread takes; the mesh's link fetches, in whichever thread it hears of a kernel."""

    def __init__(self, folder: Path, cache: KernelCache, public_key: Ed25519PublicKey) -> None:
        self._files = KernelFiles(folder, public_key)
        self._cache = cache
        self._public_key = public_key

    def admit(self, file: KernelFile) -> str:
        """Verify ``file`` and keep it; returns its digest. Raises KernelUnavailableError for one that is not genuine.

        The signature is verified before a byte is parsed or written.
        """
        try:
            self._put(file)
        except ArtifactError as error:
            raise KernelUnavailableError(f"the kernel {file.digest[:12]} was refused: {error}") from error
        self._files.write(file)
        return file.digest

    def fetch(self, digest: str) -> None:
        """Have the kernel ``digest`` (hex) at hand, from the run folder, where another process put what it verified.

        :meth:`take` verifies it again, between two steps; beside a step that would cost more (see ``KernelCache``).
        Raises KernelUnavailableError when it is gone, or not that kernel any more.
        """
        if bytes.fromhex(digest) not in self._cache:
            with self._readable(digest):
                file = self._files.read(digest)
                self._cache.hold(file.data, bytes.fromhex(digest), file.signature, self._public_key)

    def take(self, digest: str) -> Kernel:
        """The kernel ``digest`` (hex): from the cache, or from the run folder, verified again.

        Raises KernelUnavailableError when it is gone or no longer genuine.
        """
        with self._readable(digest):
            kernel = self._cache.get(bytes.fromhex(digest))
            return kernel if kernel is not None else self._put(self._files.read(digest))

    @contextlib.contextmanager
    def _readable(self, digest: str) -> Iterator[None]:
        try:
            yield
        except (OSError, ArtifactError) as error:
            raise KernelUnavailableError(
                f"the kernel {digest[:12]} is not in the run folder any more: {error}"
            ) from error

    def _put(self, file: KernelFile) -> Kernel:
        return self._cache.put(file.data, bytes.fromhex(file.digest), file.signature, self._public_key)

    def stats(self) -> CacheStats:
        """Figures of the cache."""
        return self._cache.stats()
