"""A disk that takes nothing more, where the training process writes: each place says so and hands on no half thing."""

from __future__ import annotations

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.blueprints.signature import load_public_key
from services.kasmina.kernel_cache import KernelCache
from services.tolaria.kernel_shelf import KernelShelf
from services.tolaria.ports import KernelFile, KernelUnavailableError
from services.tolaria.progress import StatusProgress
from tests.infrastructure.kernels import signed_kernel
from tests.integration.trainer_harness import Harness, config_of

pytestmark = pytest.mark.fast


@contextlib.contextmanager
def _full_disk() -> Iterator[None]:
    """No file of this process can grow: works for every user, and root too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_kernel_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    """A resume would miss it: better no graft than a run that cannot be repeated."""
    kernel = signed_kernel(tmp_path / "keys")
    shelf = KernelShelf(tmp_path / "kernels", KernelCache(1 << 20), load_public_key(tmp_path / "keys"))
    file = KernelFile("kernels/k", kernel.digest.hex(), kernel.signature, kernel.data)
    with _full_disk(), pytest.raises(KernelUnavailableError, match="cannot be kept"):
        shelf.admit(file)
    assert not list((tmp_path / "kernels").glob("*.safetensors"))
    assert shelf.admit(file) == kernel.digest.hex()
    assert shelf.take(kernel.digest.hex()).manifest == kernel.manifest


def test_a_lineage_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    harness = Harness(tmp_path, config_of())
    trainer = harness.trainer()
    trainer.reporter.transitioned([], trainer.engine, 0)
    before = (tmp_path / "lineage.json").read_bytes()
    with _full_disk():
        trainer.reporter.transitioned([], trainer.engine, 0)
    told = [message.message for message in harness.progress.heard if isinstance(message, StatusProgress)]
    assert any(message.startswith("lineage.json is not up to date: ") for message in told)
    assert (tmp_path / "lineage.json").read_bytes() == before
