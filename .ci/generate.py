"""Generates services/contracts from proto/ with the pinned protoc.

    generate.py [--check] [component ...]

With components (`common urza`) only those folders are generated; without, all of them. Files whose
content did not change are not touched and each changed file is replaced in one rename, so a process
that imports the contracts meanwhile never sees half a file. `--check` writes nothing and fails when
what is committed differs from what would be generated. Exit code 0, 1 (drift or protoc's error) or 2 (usage).
"""

from __future__ import annotations

import argparse
import fcntl
import importlib.metadata
import importlib.resources
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTO = ROOT / "proto"
CONTRACTS = ROOT / "services" / "contracts"
TOOLS = ROOT / ".tools"

# Generated code stamps a floor on the runtime: what 1.78 writes runs on protobuf 6.31 up to 7.x,
# later generators refuse it.
PROTOC_VERSION = "1.78.2"


def protos(components: list[str]) -> list[Path]:
    """The files to generate, sorted; an unknown component is a usage error."""
    folders = [PROTO / "esper" / name for name in components] if components else [PROTO / "esper"]
    for folder in folders:
        if not folder.is_dir():
            sys.exit(f"generate: no such component: {folder.relative_to(ROOT)}")
    return sorted(path for folder in folders for path in folder.rglob("*.proto"))


def run_protoc(files: list[Path], out: Path) -> None:
    """Writes messages, servicers and their typed stubs under `out`; protoc's error goes to stderr."""
    found = importlib.metadata.version("grpcio-tools")
    if found != PROTOC_VERSION:
        sys.exit(f"generate: grpcio-tools {PROTOC_VERSION} is needed, {found} is installed")
    well_known = importlib.resources.files("grpc_tools") / "_proto"
    environment = dict(os.environ)
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTO}", f"-I{well_known}"]
    command += [f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    command += [str(path.relative_to(PROTO)) for path in files]
    done = subprocess.run(command, env=environment, cwd=ROOT, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"generate: protoc failed\n{done.stderr.strip()}")


def add_package_files(out: Path) -> None:
    """Makes regular, typed packages of the folders: an unrelated `esper` could shadow a namespace package."""
    for folder in [out / "esper", *(path for path in (out / "esper").rglob("*") if path.is_dir())]:
        name = folder.relative_to(out).as_posix()
        (folder / "__init__.py").write_text(
            f'"""Generated from proto/{name} by .ci/generate.sh; never edited."""\n', encoding="utf-8"
        )
    (out / "esper" / "py.typed").write_text("", encoding="utf-8")


def stale(out: Path, components: list[str]) -> list[Path]:
    """Committed files within the generated folders that nothing generates any more."""
    folders = [Path("esper") / name for name in components] if components else [Path("esper")]
    present = (path for folder in folders for path in (CONTRACTS / folder).rglob("*") if path.is_file())
    return sorted(
        path for path in present if "__pycache__" not in path.parts and not (out / path.relative_to(CONTRACTS)).exists()
    )


def changed(out: Path) -> list[tuple[Path, Path]]:
    """(generated, committed) pairs that differ."""
    pairs = ((path, CONTRACTS / path.relative_to(out)) for path in sorted(out.rglob("*")) if path.is_file())
    return [(new, old) for new, old in pairs if not old.exists() or new.read_bytes() != old.read_bytes()]


def replace(new: Path, old: Path) -> None:
    """Puts `new` in the place of `old` in one rename."""
    old.parent.mkdir(parents=True, exist_ok=True)
    beside = old.with_name(f".{old.name}.{os.getpid()}")
    shutil.copyfile(new, beside)
    beside.replace(old)


def main(arguments: list[str]) -> int:
    """Generates or checks; returns the exit code."""
    parser = argparse.ArgumentParser(prog="generate.sh", description="Generates services/contracts from proto/.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail when something would change")
    parser.add_argument("components", nargs="*", help="folders of proto/esper; all without")
    options = parser.parse_args(arguments)
    TOOLS.mkdir(exist_ok=True)
    with (TOOLS / "generate.lock").open("w") as lock, tempfile.TemporaryDirectory(dir=TOOLS) as scratch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        out = Path(scratch)
        run_protoc(protos(options.components), out)
        add_package_files(out)
        different, obsolete = changed(out), stale(out, options.components)
        if options.check:
            for path in [*(old for _, old in different), *obsolete]:
                print(f"generate: drift: {path.relative_to(ROOT)}")
            return 1 if different or obsolete else 0
        for new, old in different:
            replace(new, old)
        for path in obsolete:
            path.unlink()
        print(f"generate: {len(different)} changed, {len(obsolete)} removed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
