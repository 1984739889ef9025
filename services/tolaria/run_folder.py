"""The folder of a run: what lies where, who holds it, and which is the newest.

Format version 1: ``config.yaml`` (effective), ``format.json``, ``addresses.json``, ``journal.jsonl``,
``metrics.jsonl``, ``events.jsonl``, ``decisions.jsonl``, ``lineage.json``, ``summary.json``, ``report.html``,
``mesh.json`` (services, restarts, start-up), ``checkpoints/``, ``export/``, ``logs/``, ``traces/`` and, unless the
configuration keeps it elsewhere, ``state/`` of the services. ``format.json`` says whether it is a run or a diagnosis,
which has ``diagnosis.json`` in place of the summary and cannot be resumed.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from pathlib import Path
from typing import Any, Final, Self

from services.chassis.config.loader import dump, load_config
from services.chassis.config.schema import EsperConfig
from services.chassis.errors import EsperError, Reason
from services.chassis.files import storage_error, write_atomically
from services.chassis.ids import new_id

FORMAT_VERSION: Final = 1
_FORMAT: Final = "format.json"
_CONFIG: Final = "config.yaml"
_LOCK: Final = "run.lock"
LATEST: Final = "latest"
RUN: Final = "run"
DIAGNOSIS: Final = "diagnosis"
_NO_NAME: Final = re.compile(r"[^A-Za-z0-9_.-]+")
_INNER: Final = ("logs", "traces", "checkpoints")


class RunFolder:
    """One run's folder, held by this process until :meth:`close`.

    Raises:
        EsperError: RUN_LOCKED when another process holds it; STORAGE_FULL, STORAGE_FAILED.
    """

    def __init__(self, path: Path) -> None:
        self.path: Final = path
        try:
            for inner in _INNER:
                (path / inner).mkdir(exist_ok=True)
            self._lock = os.open(path / _LOCK, os.O_CREAT | os.O_RDWR, 0o644)
        except OSError as error:
            raise storage_error(path, error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise EsperError(
                f"{path}: another train.py holds this run; end it first, or wait", reason=Reason.RUN_LOCKED
            ) from None
        point_latest(path)

    @property
    def run_id(self) -> str:
        """Id of the run: the name of its folder."""
        return self.path.name

    @classmethod
    def create(cls, config: EsperConfig, *, stem: str, kind: str = RUN) -> Self:
        """A new folder under ``run.output_dir``; ``stem`` begins its name where the configuration names none.

        ``kind`` is :data:`RUN` or :data:`DIAGNOSIS`.

        Raises:
            EsperError: RUN_FOLDER_INVALID when a run of this name exists; STORAGE_FULL, STORAGE_FAILED.
        """
        # The name is part of resource names: whatever a file is called, it holds no spaces or slashes.
        stem = _NO_NAME.sub("-", stem)
        name = config.run.name or f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}-{new_id()[-4:]}"
        path = config.run.output_dir.absolute() / name
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise EsperError(
                f"{path}: a run of this name exists; choose another run.name, or --resume {name}",
                reason=Reason.RUN_FOLDER_INVALID,
            ) from None
        except OSError as error:
            raise storage_error(path, error) from error
        write_atomically(path / _FORMAT, json.dumps({"format_version": FORMAT_VERSION, "kind": kind}) + "\n")
        write_atomically(path / _CONFIG, dump(config), mode=0o600)  # database URLs hold passwords
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> Self:
        """The folder of a run that exists.

        Raises:
            EsperError: RUN_FOLDER_INVALID, RUN_LOCKED.
        """
        path = path.resolve()  # "latest" is a link
        content = _read_format(path)
        version = content.get("format_version")
        if version is None:
            raise EsperError(f"{path}: it is no run folder", reason=Reason.RUN_FOLDER_INVALID)
        if version != FORMAT_VERSION:
            raise EsperError(
                f"{path}: format version {version}, this Esper reads {FORMAT_VERSION}; use the one it is of",
                reason=Reason.RUN_FOLDER_INVALID,
            )
        if content.get("kind") == DIAGNOSIS:
            raise EsperError(
                f"{path}: it is a diagnosis, which is not resumed; run train.py --diagnose again",
                reason=Reason.RUN_FOLDER_INVALID,
            )
        return cls(path)

    @classmethod
    def find(cls, run: str, output_dir: Path) -> Self:
        """The folder of ``run``: a path, a name under ``output_dir``, or (empty) the newest there.

        Raises:
            EsperError: RUN_FOLDER_INVALID, RUN_LOCKED.
        """
        if run:
            path = Path(run)
            return cls.open(path if path.is_dir() else output_dir / run)
        folders = sorted((file.parent for file in output_dir.glob(f"*/{_FORMAT}")), key=_made)
        runs = [folder for folder in folders if _read_format(folder).get("kind") != DIAGNOSIS]
        if not runs:
            raise EsperError(f"{output_dir}: there is no run to resume", reason=Reason.RUN_FOLDER_INVALID)
        return cls.open(runs[-1])

    def config(self) -> EsperConfig:
        """The effective configuration the run was started with.

        Raises:
            ConfigError: somebody changed it to something that is none.
        """
        return load_config(self.path / _CONFIG, environ={}).config

    def close(self) -> None:
        """Let go of the run."""
        os.close(self._lock)


def _made(folder: Path) -> int:
    return (folder / _FORMAT).stat().st_mtime_ns


def _read_format(folder: Path) -> dict[str, Any]:
    """What a folder says it is; empty for one that is none of ours."""
    try:
        content = json.loads((folder / _FORMAT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def point_latest(path: Path) -> None:
    """Let ``latest`` beside a run folder lead to it, for people and their shells."""
    link = path.parent / LATEST
    beside = path.parent / f".{LATEST}.{os.getpid()}"
    with contextlib.suppress(OSError):  # a convenience: a file system without links has runs all the same
        beside.symlink_to(path.name)
        beside.replace(link)
