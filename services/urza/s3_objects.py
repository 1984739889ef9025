"""The store of artifacts in a bucket of Amazon S3, or of any other store that speaks its protocol."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from services.chassis.config.schema import S3Config
from services.chassis.errors import EsperError, Reason
from services.chassis.files import storage_error

if TYPE_CHECKING:
    from obstore.store import ClientConfig
    from obstore.store import S3Config as StoreConfig

_CONNECT_TIMEOUT: Final = timedelta(seconds=3)
#: Of one request: a part of an upload, a chunk of a download.
_TIMEOUT: Final = timedelta(seconds=20)
_RETRIES: Final = 2


class S3Objects:
    """Objects of a bucket: ``<prefix>/<first two characters>/<key>``, see :class:`services.urza.objects.ObjectStore`.

    A put is whole or not at all, as the protocol demands of single and of multipart uploads, and each part carries its
    SHA-256, which the store checks. Requests are tried again when the store is busy or out of reach, for some seconds.

    Credentials are found as everywhere on AWS: ``AWS_ACCESS_KEY_ID`` and its companions, else the role of the machine.
    They must allow to put, get and list objects.
    """

    def __init__(self, settings: S3Config) -> None:
        """Look whether the bucket is there and ours.

        Raises:
            EsperError: STORAGE_FAILED, naming the bucket and what the store said.
        """
        assert settings.bucket is not None, "without a bucket artifacts are files"
        config: StoreConfig = {"checksum_algorithm": "sha256"}
        client: ClientConfig = {"timeout": _TIMEOUT, "connect_timeout": _CONNECT_TIMEOUT}
        if settings.endpoint_url is not None:
            config["endpoint"] = settings.endpoint_url.rstrip("/")
            client["allow_http"] = settings.endpoint_url.startswith("http://")
        if settings.region is not None:
            config["region"] = settings.region
        self._bucket: Final = settings.bucket
        with self._said("services.urza.s3 cannot be used"):
            self._store = S3Store(
                settings.bucket,
                prefix=settings.prefix or None,
                config=config,
                client_options=client,
                retry_config={"max_retries": _RETRIES, "retry_timeout": _TIMEOUT},
            )
            next(iter(obstore.list(self._store, chunk_size=1)), None)

    def put(self, key: str, source: Path) -> None:
        """See :class:`services.urza.objects.ObjectStore`."""
        try:
            file = source.open("rb")
        except OSError as error:
            raise storage_error(source, error) from error
        with file, self._said(key):
            obstore.put(self._store, _path(key), file)

    def size(self, key: str) -> int | None:
        """See :class:`services.urza.objects.ObjectStore`."""
        with self._said(key):
            try:
                return obstore.head(self._store, _path(key))["size"]
            except FileNotFoundError:
                return None

    def read(self, key: str, offset: int, length: int) -> bytes:
        """See :class:`services.urza.objects.ObjectStore`."""
        if length == 0:
            return b""
        with self._said(key):
            try:
                return bytes(obstore.get_range(self._store, _path(key), start=offset, length=length))
            except BaseError:
                # A range that begins at the end is refused; of a file that would be nothing.
                if offset < (self.size(key) or 0):
                    raise
                return b""

    @contextlib.contextmanager
    def _said(self, what: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:  # some of its errors are Python's own: FileNotFoundError, PermissionError
            raise EsperError(
                f"{what}: s3://{self._bucket}: {_in_words(error)}",
                reason=Reason.STORAGE_FAILED,
                metadata={"bucket": self._bucket},
            ) from error


def _in_words(error: Exception) -> str:
    """What the store said in the XML of its answer, if it did; else what went wrong on the way to it."""
    text = str(error).strip()
    said = re.search(r"<Code>(.*?)</Code>.*?<Message>(.*?)</Message>", text, re.DOTALL)
    return ": ".join(said.groups()) if said else text.partition("\n")[0]


def _path(key: str) -> str:
    return f"{key[:2]}/{key}"
