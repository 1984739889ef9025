"""Downloading a data set from a real HTTP server: progress, resume, damage, a server without ranges."""

from __future__ import annotations

import hashlib
import http.server
import io
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from services.tolaria.data import cifar, download
from services.tolaria.data.cifar import CIFAR10, CifarLayout
from services.tolaria.errors import DataCorruptError, DownloadError
from tests.unit.test_tolaria_data import write_cifar

pytestmark = pytest.mark.parallel


class Server(http.server.ThreadingHTTPServer):
    content = b""
    ranges = True
    lengths = True
    cut_after: int | None = None
    requests: list[str | None]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.requests.append(wanted)
        content, first = self.server.content, 0
        if self.path != "/archive":
            self.send_error(404)
            return
        if wanted and self.server.ranges:
            first = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if first >= len(content):
                self.send_error(416)
                return
            self.send_response(206)
        else:
            self.send_response(200)
        body = content[first:]
        if self.server.lengths:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body if self.server.cut_after is None else body[: self.server.cut_after])

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server(("127.0.0.1", 0), Handler) as running:
        running.requests = []
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def layout_at(server: Server, folder: Path, *, leave_out: str = "") -> CifarLayout:
    """A small CIFAR-10 behind ``server``."""
    layout = write_cifar(folder / "source")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as tar:
        for name in layout.files:
            if name != leave_out:
                tar.add(folder / "source" / layout.folder / name, f"{layout.folder}/{name}")
    server.content = archive.getvalue()
    return replace(
        layout,
        archive_md5=hashlib.md5(server.content).hexdigest(),  # noqa: S324 - what the publisher uses
        archive_url=f"http://127.0.0.1:{server.server_port}/archive",
    )


def test_the_command_downloads_checks_and_unpacks(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = layout_at(server, tmp_path)
    target = tmp_path / "data"
    assert download.main(["cifar10", "--data-dir", str(target)], layouts={"cifar10": layout}) == 0
    told = capsys.readouterr().err
    assert "100.0 %" in told
    assert told.endswith("is complete\n")
    images, _ = cifar.read_training(layout, target)
    assert len(images) == 30
    assert [path.name for path in target.iterdir()] == [layout.folder]


def test_a_broken_download_is_resumed(server: Server, tmp_path: Path) -> None:
    layout = layout_at(server, tmp_path)
    target = tmp_path / "archive"
    server.cut_after = 1000
    with pytest.raises(DownloadError, match="ended after 1000 of"):
        download.fetch(layout.archive_url, target, layout.archive_md5, report=lambda *_: None)
    server.cut_after = None
    seen: list[tuple[int, int | None]] = []
    download.fetch(layout.archive_url, target, layout.archive_md5, report=lambda *figures: seen.append(figures))
    assert server.requests == [None, "bytes=1000-"]
    assert seen[-1] == (len(server.content), len(server.content))
    assert target.read_bytes() == server.content
    # There already: nothing is asked for.
    download.fetch(layout.archive_url, target, layout.archive_md5, report=lambda *_: None)
    assert len(server.requests) == 2


def test_what_is_complete_but_not_yet_moved_is_recognized(server: Server, tmp_path: Path) -> None:
    layout = layout_at(server, tmp_path)
    (tmp_path / "archive.part").write_bytes(server.content)
    download.fetch(layout.archive_url, tmp_path / "archive", layout.archive_md5, report=lambda *_: None)
    assert (tmp_path / "archive").exists()


def test_a_server_without_ranges_or_lengths_starts_again(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = layout_at(server, tmp_path)
    server.ranges = server.lengths = False
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / (layout.archive + ".part")).write_bytes(b"something old")
    download.download(layout, tmp_path / "data", report=download._progress_line("cifar10"))
    assert "cifar10: 0 MiB" in capsys.readouterr().err


def test_damage_and_absence_end_with_one_line(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = layout_at(server, tmp_path)
    wrong = replace(layout, archive_md5="0" * 32)
    assert download.main(["cifar10", "--data-dir", str(tmp_path / "a")], layouts={"cifar10": wrong}) == 1
    assert "published is 00000000000000000000000000000000; the file was thrown away." in capsys.readouterr().err
    gone = replace(layout, archive_url=layout.archive_url + "/not")
    assert download.main(["cifar10", "--data-dir", str(tmp_path / "b")], layouts={"cifar10": gone}) == 1
    assert "HTTP Error 404" in capsys.readouterr().err
    (tmp_path / "broken").write_bytes(b"no archive")
    with pytest.raises(tarfile.TarError):
        download.extract(layout, tmp_path / "broken", tmp_path / "c")


def test_an_archive_with_a_missing_or_wrong_file_is_refused(server: Server, tmp_path: Path) -> None:
    layout = layout_at(server, tmp_path, leave_out="data_batch_2")
    archive = tmp_path / "archive"
    archive.write_bytes(server.content)
    with pytest.raises(DownloadError, match="does not hold cifar-10-batches-py/data_batch_2"):
        download.extract(layout, archive, tmp_path / "data")
    with pytest.raises(DataCorruptError, match=r"data_batch_1\.part is damaged"):
        download.extract(replace(layout, files=CIFAR10.files), archive, tmp_path / "other")
