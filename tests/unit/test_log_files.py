"""Logs that are held open by their writers are bounded in length and number, and lose nothing on the way."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.chassis.log_files import LogFiles

_LINE = "x" * 95


def lines(first: int, last: int) -> str:
    """Of 100 bytes each, numbered."""
    return "".join(f"{number:04}{_LINE}\n" for number in range(first, last))


@contextmanager
def no_room_beyond(size: int) -> Iterator[None]:
    """No file of this process may grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_writer_goes_on_in_the_file_it_has_and_the_oldest_part_goes(tmp_path: Path) -> None:
    kept = LogFiles(tmp_path, max_bytes=1000, files=3)
    (tmp_path / "short.log").write_text(lines(0, 10))
    (tmp_path / "addresses.json").write_text(lines(0, 20))
    with (tmp_path / "urza.log").open("a", buffering=1) as writer:
        for first in range(0, 48, 12):
            writer.write(lines(first, first + 12))
            kept.rotate()
        writer.write(lines(48, 50))
        kept.rotate()
    assert (tmp_path / "urza.log").read_text() == lines(48, 50)
    assert (tmp_path / "urza.log.1").read_text() == lines(36, 48)
    assert (tmp_path / "urza.log.2").read_text() == lines(24, 36)
    assert names(tmp_path) == {"urza.log", "urza.log.1", "urza.log.2", "short.log", "addresses.json"}
    assert (tmp_path / "short.log").read_text() == lines(0, 10)
    assert (tmp_path / "addresses.json").read_text() == lines(0, 20)


def test_of_a_flood_the_newest_whole_lines_are_kept(tmp_path: Path) -> None:
    (tmp_path / "training.log").write_text(lines(0, 1000))
    LogFiles(tmp_path, max_bytes=1050, files=4).rotate()
    assert (tmp_path / "training.log.1").read_text() == lines(980, 1000)
    assert names(tmp_path) == {"training.log", "training.log.1"}


def test_one_file_is_only_cut(tmp_path: Path) -> None:
    (tmp_path / "oona.log").write_text(lines(0, 20))
    LogFiles(tmp_path, max_bytes=1000, files=1).rotate()
    assert names(tmp_path) == {"oona.log"}
    assert (tmp_path / "oona.log").read_text() == ""


def test_without_room_for_a_copy_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "oona.log").write_text(lines(0, 15))
    (tmp_path / "oona.log.1").write_text(lines(90, 99))
    kept = LogFiles(tmp_path, max_bytes=1000, files=2)
    with no_room_beyond(1200):
        kept.rotate()
    assert (tmp_path / "oona.log").read_text() == lines(0, 15)
    assert (tmp_path / "oona.log.1").read_text() == lines(90, 99)
    assert names(tmp_path) == {"oona.log", "oona.log.1"}
    kept.rotate()
    assert (tmp_path / "oona.log.1").read_text() == lines(0, 15)


def test_a_folder_that_is_not_there_has_no_logs(tmp_path: Path) -> None:
    LogFiles(tmp_path / "gone", max_bytes=1000, files=2).rotate()
    assert names(tmp_path) == set()
