"""Frames between the training process and the process of its mesh."""

from __future__ import annotations

import io
import socket

from services.tolaria import frames


def test_frames_come_out_as_they_went_in() -> None:
    sent: list[frames.Frame] = [({"do": "show", "cause": None}, b"\x00\x01"), ({"id": 3}, b"")]
    data = b"".join(frames.pack(header, body) for header, body in sent)
    assert list(frames.unpack(io.BytesIO(data))) == sent


def test_a_frame_that_was_cut_off_is_left_out() -> None:
    whole = frames.pack({"id": 1}, b"body")
    for length in range(len(whole), 2 * len(whole)):
        assert list(frames.unpack(io.BytesIO((2 * whole)[:length]))) == [({"id": 1}, b"body")]


def test_an_end_that_was_killed_is_an_end() -> None:
    ours, theirs = socket.socketpair()
    with ours, ours.makefile("rb") as stream:
        ours.send(b"never read")
        theirs.send(frames.pack({"id": 1}))
        theirs.close()  # with something unread: a reset
        assert list(frames.unpack(stream)) in ([], [({"id": 1}, b"")])


def test_whole_frames_are_taken_out_of_what_was_read_so_far() -> None:
    sent = b"".join(frames.pack({"id": number, "text": "\u00e4"}) for number in range(3))
    read, found = bytearray(), []
    for byte in sent[:-1]:
        read.append(byte)
        found += [header["id"] for header in frames.split(read)]
    assert found == [0, 1]
    read += sent[-1:]
    assert [header["id"] for header in frames.split(read)] == [2]
    assert read == b""
