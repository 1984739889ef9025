"""Hygiene of what is committed: no machine's paths, no registry's addresses, reasons beside every exemption."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.infrastructure.processes import ROOT

# In pieces, so that this file does not find itself.
_HOSTS: Final = (
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "registry.npmjs" + ".org",
    "proxy.golang" + ".org",
    "sum.golang" + ".org",
    "maven.apache" + ".org/maven2",
    "repo1.maven" + ".org",
    "repo.maven" + ".apache.org",
    "deb.debian" + ".org",
    "index.crates" + ".io",
)
_MACHINE_PATH: Final = re.compile(r"(?<![\w.$}~/-])/(?:work|root|home/\w+|Users/\w+)(?:/|\b)(?!\w)")
_EXEMPTION: Final = re.compile(r"#\s*(?:type:\s*ignore|noqa|pragma:\s*no cover)\b(?P<rest>.*)")
_CODES: Final = re.compile(r"^(?:\[[\w\-, ]+\]|:\s*[A-Z]+\d+(?:,\s*[A-Z]+\d+)*)?")
_REASON: Final = re.compile(r"^\s*(?:#|-|:)\s*\w.*\w")
_UNFINISHED: Final = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X)\b")


def tracked() -> list[Path]:
    """Every committed file."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def text_lines(path: Path) -> list[str]:
    """A file's lines; none when it is not text."""
    try:
        return path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        return []


def addresses(line: str) -> list[str]:
    """Registry hosts named in a line."""
    return [host for host in _HOSTS if host in line]


def has_machine_path(line: str) -> bool:
    """Whether a line names a folder that is one machine's own."""
    return _MACHINE_PATH.search(line) is not None


def exempt_without_reason(line: str) -> bool:
    """Whether a line turns a check off without saying why beside it."""
    found = _EXEMPTION.search(line)
    return found is not None and _REASON.match(_CODES.sub("", found["rest"])) is None


def is_generated(path: Path) -> bool:
    """Whether nobody wrote the file by hand."""
    name = path.relative_to(ROOT).as_posix()
    return name.startswith("services/contracts/") or "/_gen/" in name or "/gen/" in name


def written_python() -> list[Path]:
    """Every committed Python file that somebody wrote by hand."""
    return [path for path in tracked() if path.suffix == ".py" and not is_generated(path)]


def test_no_registry_address_is_committed() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {host}"
        for path in tracked()
        for number, line in enumerate(text_lines(path), 1)
        for host in addresses(line)
    ]
    assert found == []


def test_no_machine_path_is_committed() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}"
        for path in tracked()
        if path != Path(__file__)
        for number, line in enumerate(text_lines(path), 1)
        if has_machine_path(line)
    ]
    assert found == []


def test_no_lock_says_where_packages_came_from() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in tracked()}
    assert not [name for name in names if Path(name).name in {"uv.lock", "poetry.lock", "yarn.lock"}]
    resolved = [
        name for name in names if Path(name).name == "package-lock.json" and '"resolved"' in (ROOT / name).read_text()
    ]
    assert resolved == []


def test_every_package_of_the_lock_is_exact_and_hashed() -> None:
    for name in ("lock.txt", "bootstrap.txt"):
        entries = re.split(r"\n(?=\S)", (ROOT / "requirements" / name).read_text(encoding="utf-8").strip())
        assert len(entries) >= 1
        assert [
            entry.split("\n", maxsplit=1)[0] for entry in entries if "==" not in entry or "--hash=" not in entry
        ] == []


def test_every_exemption_has_its_reason_beside_it() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in written_python()
        if path != Path(__file__)
        for number, line in enumerate(text_lines(path), 1)
        if exempt_without_reason(line)
    ]
    assert found == []


def test_nothing_is_left_unfinished() -> None:
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path in tracked()
        if not is_generated(path)
        for number, line in enumerate(text_lines(path), 1)
        if _UNFINISHED.search(line)
    ]
    assert found == []


def test_every_folder_of_tests_is_a_package() -> None:
    folders = {path.parent for path in written_python() if "tests" in path.relative_to(ROOT).parts[:1]}
    assert [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()] == []


def test_google_rpc_is_never_vendored() -> None:
    assert [path for path in tracked() if "google/rpc" in path.as_posix()] == []


def test_nothing_large_is_committed() -> None:
    assert [f"{path.relative_to(ROOT)}" for path in tracked() if path.stat().st_size > 2 * 2**20] == []


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("cd /work/main", True),
        ("data = '/root/.cache'", True),
        ("/home/someone/x", True),
        ("WORKDIR /workspace", False),
        ("runs/work/main", False),
        ("see ~/work", False),
        ("$HOME/work/x", False),
    ],
)
def test_machine_paths_are_recognized(line: str, expected: bool) -> None:
    assert has_machine_path(line) is expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("x = 1  # type: " + "ignore", True),
        ("x = 1  # type: " + "ignore[assignment]", True),
        ("x = 1  # type: " + "ignore[assignment]  # the stub forgets None", False),
        ("import services  # noqa" + ": F401", True),
        ("import services  # noqa" + ": F401 - for its side effect", False),
        ("x = 1  # ordinary", False),
    ],
)
def test_exemptions_without_reason_are_recognized(line: str, expected: bool) -> None:
    assert exempt_without_reason(line) is expected
