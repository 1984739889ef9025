"""Saved states of a run: a folder with safetensors and a JSON manifest, complete or not there at all. No pickle.

A checkpoint is written into a temporary folder beside its place, flushed to the disk and renamed; so a crash or a full
disk leaves what was there before. The manifest carries the SHA-256 of the tensors and of itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from services.tolaria.errors import CheckpointError, CheckpointWriteError

FORMAT_VERSION: Final = 1
_MANIFEST: Final = "manifest.json"
_TENSORS: Final = "tensors.safetensors"
_NAME: Final = re.compile(r"^\d{8}$")


@dataclass(frozen=True, slots=True)
class State:
    """All that decides how a run goes on: ``tensors`` by name and ``values``, a JSON object."""

    tensors: Mapping[str, Tensor]
    values: Mapping[str, Any]

    def detached(self) -> State:
        """A copy that later steps do not touch."""
        # Through JSON, so that a snapshot in memory and one from the disk are the same thing.
        copies = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        return State(copies, json.loads(json.dumps(self.values)))


def environment(threads: int, device: str) -> dict[str, Any]:
    """What the last bits of a run depend on."""
    return {"torch": torch.__version__, "processor": platform.machine(), "threads": threads, "device": device}


class CheckpointStore:
    """The checkpoints of one arm below ``folder``; the newest ``keep`` are kept."""

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder = folder
        self._keep = keep

    def save(self, step: int, state: State, *, newest: bool = False) -> Path:
        """Write the checkpoint of ``step``, replacing one of the same step, and remove the oldest.

        With ``newest`` those of later steps are removed once it is written: the run went back, and it alone tells
        where the run is.

        Raises CheckpointWriteError when the disk is full or gone; everything written before is intact then.
        """
        target, temporary = self._folder / f"{step:08d}", self._folder / f".{step:08d}.tmp"
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            # Copies, because safetensors refuses tensors that share memory (tied weights).
            tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.tensors.items()}
            content = safetensors.torch.save(tensors)
            _write(temporary / _TENSORS, content)
            manifest = {
                "format_version": FORMAT_VERSION,
                "step": step,
                "tensors_sha256": hashlib.sha256(content).hexdigest(),
                "values": dict(state.values),
            }
            _write(temporary / _MANIFEST, _sealed(manifest))
            if target.exists():
                shutil.rmtree(target)
            temporary.rename(target)
            _flush_folder(self._folder)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise CheckpointWriteError(f"checkpoint {target} was not written: {error.strerror}") from error
        if newest:
            self.discard_after(step)
        for old in self.steps()[: -self._keep]:
            shutil.rmtree(self.path(old), ignore_errors=True)
        return target

    def path(self, step: int) -> Path:
        """Folder of the checkpoint of ``step``."""
        return self._folder / f"{step:08d}"

    def steps(self) -> list[int]:
        """Steps of all complete checkpoints, oldest first."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(int(entry.name) for entry in self._folder.iterdir() if _NAME.match(entry.name))
        return []

    def discard_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: after a rollback they belong to a past that did not happen."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self.path(later), ignore_errors=True)

    def load(self, step: int) -> State:
        """The state saved at ``step``. Raises CheckpointError naming what is wrong with it."""
        return load(self.path(step))


def load(folder: Path) -> State:
    """Read and verify one checkpoint. Raises CheckpointError for a missing, damaged or foreign one."""
    try:
        manifest = _unsealed(json.loads((folder / _MANIFEST).read_bytes()))
        content = (folder / _TENSORS).read_bytes()
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}/{_MANIFEST} is damaged: {error}") from error
    if manifest["format_version"] != FORMAT_VERSION:
        raise CheckpointError(f"{folder} has format {manifest['format_version']}; this version reads {FORMAT_VERSION}")
    if hashlib.sha256(content).hexdigest() != manifest["tensors_sha256"]:
        raise CheckpointError(f"{folder}/{_TENSORS} is damaged: its SHA-256 is not the one in the manifest")
    return State(safetensors.torch.load(content), manifest["values"])


def _sealed(manifest: dict[str, Any]) -> bytes:
    return json.dumps({"sha256": _digest(manifest), "manifest": manifest}).encode()


def _unsealed(content: dict[str, Any]) -> dict[str, Any]:
    manifest: dict[str, Any] = content["manifest"]
    if _digest(manifest) != content["sha256"]:
        raise ValueError("its SHA-256 does not fit its content")
    return manifest


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
