"""Every command of the README and the user guide is run, as it stands, in a folder that looks like the repository.

A fenced ``sh`` block may be preceded by a comment that says how: ``<!-- make -->`` (its targets exist),
``<!-- live -->`` (while a run goes on), ``<!-- kafka -->``, ``<!-- s3 -->`` and ``<!-- cifar10 -->`` (where those are).
All others run as they are, in their order; the python block is the file that the text names.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.infrastructure.processes import ROOT, need

pytestmark = [pytest.mark.parallel, pytest.mark.timeout(600)]

_BLOCK = re.compile(r"(?:<!-- (?P<how>\w+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
_PAGES = ("README.md", "docs/user_guide.md")
_LINKED = ("train.py", "services", "configs", "deploy", "docs", "proto", "Makefile", ".ci", ".venv", ".tools")
_SECONDS = 300
_CIFAR10 = ROOT.parent / "shared" / "data" / "cifar-10-batches-py"


@dataclass(frozen=True)
class Block:
    """One fenced block of a page."""

    how: str
    language: str
    text: str


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    return [Block(m["how"] or "", m["language"], m["text"]) for m in _BLOCK.finditer(text)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the repository's content by links, so that runs land elsewhere."""
    made = tmp_path_factory.mktemp("docs") / "esper"
    made.mkdir()
    for name in _LINKED:
        if (ROOT / name).exists():
            (made / name).symlink_to(ROOT / name)
    if _CIFAR10.exists():
        (made.parent / "shared").symlink_to(ROOT.parent / "shared")
    return made


def environment(**changes: str) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), str(ROOT / ".tools" / "bin"), os.environ["PATH"]])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ESPER__")}
    return {**kept, "PATH": path, **changes}


def run(script: str, folder: Path, **changes: str) -> str:
    """Run a block as a person would; fails with its output when a command does."""
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=_SECONDS,
        check=False,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done.stdout


def test_the_targets_that_pages_name_exist(folder: Path) -> None:
    made = [block for page in _PAGES for block in blocks(page) if block.how == "make"]
    assert made
    for block in made:
        for target in re.findall(r"^make (\S+)", block.text, re.MULTILINE):
            run(f"make -n {target}", folder)


def test_what_the_readme_runs_the_user_guide_runs_too() -> None:
    guide = blocks("docs/user_guide.md")
    assert [block for block in blocks("README.md") if block.language == "sh" and block.how != "make"]
    assert all(block in guide for block in blocks("README.md") if block.language == "sh" and block.how != "make")


def test_the_user_guide_runs_from_top_to_bottom(folder: Path) -> None:
    ran = 0
    for block in blocks("docs/user_guide.md"):
        if block.language == "python":
            (folder / "mine.py").write_text(block.text, encoding="utf-8")
        if block.language != "sh" or block.how:
            continue
        run(block.text, folder)
        ran += 1
    assert ran >= 8
    assert (folder / "runs" / "latest" / "report.html").stat().st_size > 5_000


@contextlib.contextmanager
def live_run(folder: Path) -> Iterator[None]:
    """A run that goes on until the block is left."""
    shutil.rmtree(folder / "runs", ignore_errors=True)
    command = ["python", "train.py", "--quick-start", "digits", "--quiet", "--set", "training.epochs=100000"]
    process = subprocess.Popen([*command, "--set", "compare=[]"], cwd=folder, env=environment())
    try:
        deadline = time.monotonic() + 120
        while not (folder / "runs" / "latest" / "metrics.jsonl").exists():
            assert process.poll() is None, "the run ended early"
            assert time.monotonic() < deadline, "no epoch within a minute"
            time.sleep(0.1)  # waits for a file of another process; there is nothing to be notified by
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 143


def test_a_live_mesh_is_looked_into_and_steered_as_the_guide_says(folder: Path) -> None:
    need((ROOT / ".tools" / "bin" / "grpcurl").exists() or shutil.which("grpcurl") is not None, "grpcurl is missing")
    live = [block for block in blocks("docs/user_guide.md") if block.how == "live"]
    assert len(live) >= 3
    with live_run(folder):
        output = "".join(run(block.text, folder) for block in live)
    for word in ("BlueprintService", "RUN_STATE_PAUSED", "SERVING", "policies/utilization@2", "checkpoint"):
        assert word in output


def test_cifar10_as_the_guide_says(folder: Path) -> None:
    if not _CIFAR10.exists():
        pytest.skip("the official CIFAR-10 files are not beside this checkout")
    for block in blocks("docs/user_guide.md"):
        if block.how == "cifar10":
            assert "test %" in run(block.text, folder)


@pytest.mark.kafka
def test_kafka_as_the_guide_says(folder: Path) -> None:
    need(shutil.which("mvn") is not None and shutil.which("java") is not None, "Java or Maven is missing")
    for block in blocks("docs/user_guide.md"):
        if block.how == "kafka":
            run(block.text, folder)


def test_s3_as_the_guide_says(folder: Path) -> None:
    found = subprocess.run([ROOT / "deploy/s3/start.sh", "--find"], capture_output=True, check=False).returncode == 0
    need(found, "versitygw is missing (`make test` builds it where Go is)")
    (block,) = [block for block in blocks("docs/user_guide.md") if block.how == "s3"]
    output = run(block.text, folder)
    assert re.search(r"objects/esper/../[0-9a-f]{64}$", output, re.MULTILINE), "no kernel is in the bucket"
