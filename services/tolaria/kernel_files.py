"""The kernels in a run folder, so that a resume needs no mesh. Torch-free: verifies, and parses nothing."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from services.blueprints.artifact import ArtifactError, verify
from services.chassis.errors import EsperError
from services.chassis.files import write_atomically
from services.tolaria.ports import KernelFile, KernelUnavailableError


class KernelFiles:
    """Two files for each kernel in ``folder``: what Tezzeret made, and its signature that ``public_key`` checks."""

    def __init__(self, folder: Path, public_key: Ed25519PublicKey) -> None:
        self._folder = folder
        self._public_key = public_key

    def admit(self, file: KernelFile) -> str:
        """Verify ``file`` and keep it; returns its digest.

        Raises KernelUnavailableError for one that is not genuine, or cannot be written. Nothing is parsed, and nothing
        written, before the signature is verified.
        """
        try:
            verify(file.data, bytes.fromhex(file.digest), file.signature, self._public_key)
        except ArtifactError as error:
            raise KernelUnavailableError(f"the kernel {file.digest[:12]} was refused: {error}") from error
        self.write(file)
        return file.digest

    def write(self, file: KernelFile) -> None:
        """Keep a file that was verified. Raises KernelUnavailableError: what a resume cannot find must not be used."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # The signature first: a kernel file is only looked for once both are there.
            write_atomically(self._folder / f"{file.digest}.signature", file.signature)
            write_atomically(self._folder / f"{file.digest}.safetensors", file.data)
        except (OSError, EsperError) as error:
            raise KernelUnavailableError(f"the kernel {file.digest[:12]} cannot be kept: {error}") from error

    def read(self, digest: str) -> KernelFile:
        """The file of ``digest`` (hex), as it is now: not verified. Raises OSError."""
        data = (self._folder / f"{digest}.safetensors").read_bytes()
        return KernelFile("", digest, (self._folder / f"{digest}.signature").read_bytes(), data)
