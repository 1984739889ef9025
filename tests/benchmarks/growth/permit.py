"""Who may read the test set: final runs, once the very protocol they follow is committed. Torch-free."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from services.chassis.files import write_atomically
from tests.benchmarks.growth.protocol import Protocol
from tests.infrastructure.processes import ROOT

PROTOCOL_FILE: Final = "docs/benchmarks/protocol.json"


class ProtocolNotCommittedError(RuntimeError):
    """The test set was asked for before everything was fixed."""


def write(protocol: Protocol, root: Path = ROOT) -> Path:
    """Write ``protocol`` into :data:`PROTOCOL_FILE`, beside those that are fixed already.

    Committing it is left to whoever takes responsibility for it.
    """
    path = root / PROTOCOL_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    fixed = json.loads(path.read_bytes()) if path.exists() else {}
    fixed[protocol.name] = {"hash": protocol.hash, **protocol.content()}
    write_atomically(path, json.dumps(fixed, indent=1) + "\n")
    return path


def require_committed(protocol: Protocol, root: Path = ROOT) -> str:
    """Id of the newest commit, which holds ``protocol``. Raises ProtocolNotCommittedError saying what is missing."""
    way_out = "tune with --tune, then write the protocol with --write-protocol and commit it: from then on it is fixed"
    shown = _git(root, "show", f"HEAD:{PROTOCOL_FILE}")
    if shown is None:
        raise ProtocolNotCommittedError(f"{PROTOCOL_FILE} is not committed: the test set stays shut; {way_out}")
    try:
        committed: Mapping[str, Any] = json.loads(shown).get(protocol.name, {})
    except ValueError:
        committed = {}
    without_hash = {key: value for key, value in committed.items() if key != "hash"}
    if committed.get("hash") != protocol.hash or without_hash != protocol.content():
        raise ProtocolNotCommittedError(
            f"{PROTOCOL_FILE} as committed is not the protocol {protocol.name} as it is now ({protocol.hash[:12]}): "
            f"the test set stays shut; {way_out}"
        )
    commit = _git(root, "rev-parse", "HEAD")
    assert commit is not None, "a file was read from it"
    return commit.strip()


def commit_of(root: Path = ROOT) -> str | None:
    """Id of the newest commit; None where there is none."""
    found = _git(root, "rev-parse", "HEAD")
    return None if found is None else found.strip()


def _git(root: Path, *arguments: str) -> str | None:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    return done.stdout if done.returncode == 0 else None
