"""``python -m services.urza``: the library in a process of its own."""

from __future__ import annotations

import asyncio
import sys
from concurrent.futures import ThreadPoolExecutor

from esper.urza.v1.blueprint_service_pb2_grpc import add_BlueprintServiceServicer_to_server
from services.chassis.service_main import ServiceContext, run_service
from services.urza.library import Library
from services.urza.objects import DirectoryObjects, ObjectStore
from services.urza.servicer import BlueprintServicer
from services.urza.sql_metadata import SqlMetadata
from services.urza.staging import Staging

_THREADS = 4


class Urza:
    """The component: stores, the library on them, and its servicer."""

    def __init__(self, context: ServiceContext) -> None:
        """Registers the servicer; nothing is opened before :meth:`start`."""
        settings = context.config.services.urza
        self._url = settings.database_url or f"sqlite:///{context.state_dir / 'library.sqlite'}"
        self._artifacts = settings.artifacts_dir or context.state_dir / "artifacts"
        self._s3 = settings.s3
        self._staging = context.state_dir / "uploads"
        self._keys = context.keys_dir
        self._context = context
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="urza")
        self._metadata: SqlMetadata | None = None

    async def start(self) -> None:
        """Open the stores, bring the schema up to date, put the built-in blueprints in."""
        library = await asyncio.get_running_loop().run_in_executor(self._pool, self._open)
        self._context.server.add(
            add_BlueprintServiceServicer_to_server,
            BlueprintServicer(library, self._pool, draining=self._context.draining),
            "esper.urza.v1.BlueprintService",
        )

    def _open(self) -> Library:
        self._metadata = SqlMetadata(self._url)
        library = Library(self._metadata, self._objects(), Staging(self._staging), self._keys)
        library.seed()
        return library

    def _objects(self) -> ObjectStore:
        if self._s3.bucket is None:
            return DirectoryObjects(self._artifacts)
        # Only here: 15 MB that nobody needs whose artifacts are files.
        from services.urza.s3_objects import S3Objects

        return S3Objects(self._s3)

    async def stop(self) -> None:
        """Finish calls under way, close the stores."""
        self._pool.shutdown()
        if self._metadata is not None:
            self._metadata.close()


async def build(context: ServiceContext) -> Urza:
    """Urza for the chassis."""
    return Urza(context)


if __name__ == "__main__":
    sys.exit(run_service("urza", build))
