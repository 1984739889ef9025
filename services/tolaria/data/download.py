"""``python -m services.tolaria.data.download {cifar10,cifar100} --data-dir DIR``: the official files, resumable.

The archive goes to ``DIR/<archive>.part`` first; a second start asks only for the rest (HTTP Range, RFC 9110). Its MD5
and that of every file in it are checked before the files are moved into place. Torch-free.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tarfile
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from http import HTTPStatus
from pathlib import Path
from typing import Final

from services.tolaria.data.cifar import LAYOUTS, CifarLayout, check_file
from services.tolaria.errors import DataError, DownloadError

_CHUNK: Final = 1 << 18
TIMEOUT_SECONDS: Final = 30.0
Report = Callable[[int, int | None], None]


def fetch(url: str, target: Path, md5: str, *, report: Report, timeout: float = TIMEOUT_SECONDS) -> None:
    """Download ``url`` to ``target``, going on where an earlier try stopped; ``report(bytes_so_far, bytes_in_all)``.

    ``timeout`` is for each wait on the network, seconds. Raises DownloadError when the transfer stops (what arrived is
    kept in ``<target>.part``) or when the MD5 is wrong (nothing is kept).
    """
    if target.is_file() and _md5(target) == md5:
        return
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        _transfer(url, part, report=report, timeout=timeout)
    except OSError as error:  # URLError and timeouts are OSErrors; a short read is checked by length below
        kept = part.stat().st_size if part.exists() else 0
        raise DownloadError(f"{url}: {error}. {kept} bytes are kept; run the command again to go on.") from error
    found = _md5(part)
    if found != md5:
        part.unlink()
        raise DownloadError(f"{url}: MD5 is {found}, published is {md5}; the file was thrown away.")
    part.replace(target)


def extract(layout: CifarLayout, archive: Path, data_dir: Path) -> Path:
    """Put the files of ``layout`` in ``data_dir/<folder>``, each checked first; returns the folder.

    Only the expected names are taken out of the archive, by content: no path in it is trusted.
    Raises DownloadError for a name that is missing, DataCorruptError for a wrong MD5.
    """
    folder = data_dir / layout.folder
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as tar:
        for name, md5 in layout.files.items():
            member = tar.extractfile(f"{layout.folder}/{name}") if _holds(tar, f"{layout.folder}/{name}") else None
            if member is None:
                raise DownloadError(f"{archive} does not hold {layout.folder}/{name}")
            part = folder / (name + ".part")
            part.write_bytes(member.read())
            check_file(part, md5)
            part.replace(folder / name)
    return folder


def download(layout: CifarLayout, data_dir: Path, *, report: Report) -> Path:
    """Fetch and unpack ``layout`` below ``data_dir``; the archive is removed at the end. Returns the folder."""
    archive = data_dir / layout.archive
    fetch(layout.archive_url, archive, layout.archive_md5, report=report)
    folder = extract(layout, archive, data_dir)
    archive.unlink()
    return folder


def _holds(tar: tarfile.TarFile, name: str) -> bool:
    return name in tar.getnames()


def _transfer(url: str, part: Path, *, report: Report, timeout: float) -> None:
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})  # noqa: S310 - the scheme is checked by main's table of addresses
    try:
        response = urllib.request.urlopen(request, timeout=timeout)  # noqa: S310 - as above
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            return  # everything is here already: the MD5 decides
        raise
    with response:
        resumed = response.status == HTTPStatus.PARTIAL_CONTENT
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length is not None else None
        with part.open("ab" if resumed else "wb") as file:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                have += len(chunk)
                report(have, total)
    if total is not None and have < total:
        raise DownloadError(
            f"{url}: the connection ended after {have} of {total} bytes; run the command again to go on."
        )


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _progress_line(name: str) -> Report:
    def report(have: int, total: int | None) -> None:
        share = f"{100 * have / total:5.1f} % of {total / 2**20:.0f} MiB" if total else f"{have / 2**20:.0f} MiB"
        sys.stderr.write(f"\r{name}: {share}")
        sys.stderr.flush()

    return report


def main(argv: Sequence[str] | None = None, *, layouts: dict[str, CifarLayout] | None = None) -> int:
    """The command. Returns 0, or 1 with one line on standard error."""
    table = dict(LAYOUTS) if layouts is None else layouts
    parser = argparse.ArgumentParser(prog="python -m services.tolaria.data.download", description="Fetch a data set.")
    parser.add_argument("name", choices=sorted(table), help="which data set")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="folder to put it in (default: data)")
    arguments = parser.parse_args(argv)
    try:
        folder = download(table[arguments.name], arguments.data_dir, report=_progress_line(arguments.name))
    except (DataError, OSError, tarfile.TarError) as error:
        sys.stderr.write(f"\n{error}\n")
        return 1
    sys.stderr.write(f"\n{folder} is complete\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
