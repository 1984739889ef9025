"""Lines of JSON on a disk that may fill up or tear them, offsets in page tokens, errors too long for their trailers."""

from __future__ import annotations

import base64
import contextlib
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.chassis.errors import EsperError, Reason, Resource, invalid, not_found, to_rpc_status
from services.chassis.files import append_line
from services.chassis.pagination import decode_offset, decode_token, encode_token


@contextlib.contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """A disk that takes no byte more than ``size`` into one file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_a_line_that_does_not_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    append_line(path, {"n": 1}, fsync=True)
    whole = path.read_bytes()
    with files_of_at_most(len(whole) + 10), pytest.raises(EsperError) as caught:
        append_line(path, {"text": "x" * 100}, fsync=True)
    assert caught.value.reason is Reason.STORAGE_FULL
    assert path.read_bytes() == whole
    append_line(path, {"n": 2})
    assert [json.loads(line)["n"] for line in path.read_text().splitlines()] == [1, 2]


def test_a_torn_line_costs_itself_only(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"n":1}\n{"n":')
    append_line(path, {"n": 3})
    assert path.read_text() == '{"n":1}\n{"n":\n{"n":3}\n'


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(EsperError, match="No such file") as caught:
        append_line(tmp_path / "none" / "lines.jsonl", {})
    assert caught.value.reason is Reason.STORAGE_FAILED


@given(offset=st.integers(0, 10**18 - 1))
def test_an_offset_comes_back(offset: int) -> None:
    assert decode_offset({"list": "x"}, encode_token({"list": "x"}, str(offset))) == offset


@pytest.mark.parametrize("cursor", ["", "-1", "1.5", "one", "²", "9" * 5000])
def test_a_cursor_that_is_no_offset_is_refused(cursor: str) -> None:
    assert decode_offset({}, "") == 0
    with pytest.raises(EsperError) as caught:
        decode_offset({}, encode_token({}, cursor))
    assert caught.value.reason is Reason.INVALID_PAGE_TOKEN


def test_a_token_that_nests_without_end_is_refused() -> None:
    bomb = base64.urlsafe_b64encode(b"[" * 200_000).decode()
    with pytest.raises(EsperError) as caught:
        decode_token({}, bomb)
    assert caught.value.reason is Reason.INVALID_PAGE_TOKEN


@pytest.mark.parametrize("letter", ["x", "é", "\U0001f331"])
def test_an_error_fits_its_trailers_whatever_a_client_sends(letter: str) -> None:
    long = letter * 100_000
    errors = [
        invalid(long, long, long),
        not_found("run", long),
        EsperError(
            long,
            reason=Reason.INVALID_FIELD,
            metadata={"field": long},
            violations=[*invalid(long, long, long).violations] * 100,
            resource=Resource("run", long),
        ),
    ]
    for error in errors:
        status = to_rpc_status(error)
        assert status.details.endswith("...")
        assert letter in status.details
        # Both go into the header block: the message percent-encoded, the details in base 64.
        details = status.trailing_metadata[0][1]
        assert len(status.details.encode()) * 3 + len(details) * 4 / 3 < 8192
