"""docs/api_reference.md is what the contracts, the table of errors and the table of topics say."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Final

from services.chassis.errors import Reason
from services.oona.topics import PLATFORM_TOPICS
from tests.infrastructure.processes import ROOT

_PAGE: Final = ROOT / "docs" / "api_reference.md"


def test_the_page_is_not_behind_its_sources() -> None:
    command = [sys.executable, "docs/generate_api_reference.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_it_names_every_rpc_reason_and_topic() -> None:
    page = _PAGE.read_text(encoding="utf-8")
    for path in (ROOT / "proto" / "esper").rglob("*_service.proto"):
        for rpc in re.findall(r"^  rpc (\w+)\(", path.read_text(encoding="utf-8"), re.MULTILINE):
            assert re.search(rf"^\| `{rpc}` \|.*\| \S.* \|$", page, re.MULTILINE), f"{rpc} is missing, or its comment"
    for reason in Reason:
        assert f"| `{reason.value}` | {reason.code.name} |" in page
    for topic in PLATFORM_TOPICS:
        assert f"| `{topic}` |" in page


def test_nothing_is_left_without_a_meaning() -> None:
    bare = [line for line in _PAGE.read_text(encoding="utf-8").splitlines() if re.search(r"\|\s*\|$", line)]
    assert not bare
