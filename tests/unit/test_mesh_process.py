"""The mesh's process where a whole one would be too slow to ask."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import cast

import pytest

from services.blueprints.signature import load_public_key
from services.tolaria.kernel_files import KernelFiles
from services.tolaria.mesh import MeshClient
from services.tolaria.mesh_process import MeshProcess, _services_are_there
from services.tolaria.ports import KernelFile, KernelUnavailableError
from tests.infrastructure.kernels import signed_kernel

pytestmark = pytest.mark.fast


def test_it_waits_for_the_services_as_long_as_there_is_somebody_to_wait_for(tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        with ours:
            found: list[bool] = []
            waiting = threading.Thread(target=lambda: found.append(_services_are_there(tmp_path, theirs)))
            waiting.start()
            time.sleep(0.05)
            assert not found, "they are nowhere yet"
            (tmp_path / "addresses.json").write_text("{}")
            waiting.join(10)
            assert found == [True]
            (tmp_path / "addresses.json").unlink()
        assert not _services_are_there(tmp_path, theirs), "the training process is gone"


def test_a_kernel_that_has_come_meanwhile_is_not_cancelled() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        served = MeshProcess(cast("MeshClient", None), theirs)
        served._cancel({"id": 7}, b"")
        ours.setblocking(False)
        with pytest.raises(BlockingIOError):
            ours.recv(1)
    served.tell_kernel("0a")  # nobody hears it, and it is no reason to die


def test_a_kernel_that_is_not_genuine_is_not_written(tmp_path: Path) -> None:
    kernel = signed_kernel(tmp_path / "keys")
    files = KernelFiles(tmp_path / "kernels", load_public_key(tmp_path / "keys"))
    changed = KernelFile("kernels/k", kernel.digest.hex(), kernel.signature, kernel.data + b" ")
    with pytest.raises(KernelUnavailableError, match="was refused"):
        files.admit(changed)
    assert not (tmp_path / "kernels").exists()
