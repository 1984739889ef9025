"""A launcher for the tests that kill one: ``python -m tests.support.mesh_launcher RUN_DIR``.

Starts six services and a waiting job, prints the pids of all of them and waits.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

from services.chassis.config.schema import EsperConfig
from services.chassis.supervisor import Job, Supervisor


async def main(run_dir: Path) -> None:
    job = Job(
        name="training",
        command=(sys.executable, "-m", "tests.support.mesh_job", sys.argv[2]),
        restart=lambda *_: None,
        on_progress=lambda _: None,
    )
    async with Supervisor(
        EsperConfig(), run_dir, program=lambda name: (sys.executable, "-m", "tests.support.mesh_service", name)
    ) as mesh:
        await mesh.start(job)
        pids = [status.pid for status in mesh.services.values()]
        pids += [child.pid for child in mesh._jobs.values()]
        sys.stdout.write(json.dumps(pids) + "\n")
        sys.stdout.flush()
        await mesh.wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
