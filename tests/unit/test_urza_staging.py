"""Uploads under way: what has arrived stays, and nobody mixes bytes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.chassis.errors import EsperError, Reason
from services.urza.staging import Staging

_A, _B = b"a" * 32, b"b" * 32


@pytest.fixture
def staging(tmp_path: Path) -> Staging:
    return Staging(tmp_path / "uploads", max_partials=2)


def _reason(call: object) -> Reason:
    with pytest.raises(EsperError) as caught:
        call()  # type: ignore[operator]  # a lambda of the tests below
    return caught.value.reason


def test_an_upload_goes_on_where_it_broke_off(staging: Staging) -> None:
    assert staging.committed_bytes(_A) == 0
    with staging.open(_A, 6, 0) as upload:
        upload.append(b"abc")
        assert not upload.complete
    assert staging.committed_bytes(_A) == 3
    with staging.open(_A, 6, 3) as upload:
        upload.append(b"def")
        assert upload.complete
        assert upload.read() == b"abcdef"
        upload.discard()
    assert staging.committed_bytes(_A) == 0


def test_bytes_beyond_the_offset_are_written_anew(staging: Staging) -> None:
    with staging.open(_A, 6, 0) as upload:
        upload.append(b"abcde")
    with staging.open(_A, 6, 2) as upload:
        assert upload.read() == b"ab"


def test_an_offset_ahead_of_what_arrived_is_refused_and_leaves_nothing(staging: Staging, tmp_path: Path) -> None:
    with pytest.raises(EsperError) as caught:
        staging.open(_A, 6, 1)
    assert caught.value.reason is Reason.UPLOAD_OFFSET_MISMATCH
    assert caught.value.metadata == {"committed_bytes": "0"}
    assert list((tmp_path / "uploads").iterdir()) == []
    with staging.open(_A, 6, 0) as upload:
        upload.append(b"ab")
    assert _reason(lambda: staging.open(_A, 6, 3)) is Reason.UPLOAD_OFFSET_MISMATCH
    assert staging.committed_bytes(_A) == 2


def test_more_bytes_than_the_size_are_refused(staging: Staging) -> None:
    with staging.open(_A, 3, 0) as upload:
        upload.append(b"ab")
        assert _reason(lambda: upload.append(b"cd")) is Reason.UPLOAD_OFFSET_MISMATCH
        assert staging.committed_bytes(_A) == 2


def test_two_cannot_write_one_artifact(staging: Staging, tmp_path: Path) -> None:
    with staging.open(_A, 6, 0) as upload:
        upload.append(b"abc")
        assert _reason(lambda: staging.open(_A, 6, 0)) is Reason.UPLOAD_IN_PROGRESS
        code = (
            "import sys, pathlib, services; from services.urza.staging import Staging;"
            "Staging(pathlib.Path(sys.argv[1])).open(b'a' * 32, 6, 0)"
        )
        other = subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "uploads")], capture_output=True, text=True, check=False
        )
        assert "somebody else uploads this artifact now" in other.stderr
        assert staging.committed_bytes(_A) == 3, "the other did not shorten it"


def test_a_file_that_was_dropped_while_we_waited_for_it_is_not_written(staging: Staging) -> None:
    upload = staging.open(_A, 6, 0)
    late = staging.open(_B, 6, 0)
    late.discard()  # as its owner would between our opening and locking it
    assert _reason(lambda: late.begin(0)) is Reason.UPLOAD_IN_PROGRESS
    upload.close()
    late.close()


def test_unfinished_uploads_are_bounded_in_number_and_age(staging: Staging, tmp_path: Path) -> None:
    for digest in (_A, _B):
        staging.open(digest, 6, 0).close()
    assert _reason(lambda: staging.open(b"c" * 32, 6, 0)) is Reason.TOO_MANY_UPLOADS
    staging.open(_A, 6, 0).close()  # one that is known goes on
    old = time.time() - 25 * 3600
    os.utime(tmp_path / "uploads" / f"{_A.hex()}.part", (old, old))
    staging.open(b"c" * 32, 6, 0).close()
    assert len(list((tmp_path / "uploads").iterdir())) == 2


def test_old_uploads_go_when_it_starts(tmp_path: Path) -> None:
    Staging(tmp_path).open(_A, 6, 0).close()
    Staging(tmp_path, keep_seconds=3600)
    assert len(list(tmp_path.iterdir())) == 1
    Staging(tmp_path, keep_seconds=-1)
    assert list(tmp_path.iterdir()) == []


def test_a_close_during_work_takes_effect_at_its_end(staging: Staging) -> None:
    upload = staging.open(_A, 6, 0)
    closed = threading.Event()

    def close() -> None:
        upload.close()
        closed.set()

    with upload.working():
        threading.Thread(target=close).start()
        assert closed.wait(5), "closing does not wait for the work"
        assert _reason(lambda: staging.open(_A, 6, 0)) is Reason.UPLOAD_IN_PROGRESS
    staging.open(_A, 6, 0).close()


@pytest.fixture
def small_files() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_keeps_what_has_arrived(staging: Staging, small_files: None) -> None:
    with staging.open(_A, 10_000, 0) as upload:
        assert _reason(lambda: upload.append(b"x" * 8192)) is Reason.STORAGE_FULL
        assert upload.received == 4096
    assert staging.committed_bytes(_A) == 4096


def test_a_folder_that_is_gone_is_a_storage_error(staging: Staging, tmp_path: Path) -> None:
    (tmp_path / "uploads").rmdir()
    assert _reason(lambda: staging.open(_A, 6, 0)) is Reason.STORAGE_FAILED
