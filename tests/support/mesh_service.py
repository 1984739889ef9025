"""A service for the tests of the supervisor: ``python -m tests.support.mesh_service NAME <arguments of a service>``.

``behavior.json`` in the run folder says by name how it misbehaves; see :class:`Misbehaving`.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

from services.chassis.service_main import ServiceContext, run_service


class Misbehaving:
    """Does at its start what it is told: "" nothing, "die", "bug", "die mute", "hang", "grandchild", "stubborn"."""

    def __init__(self, context: ServiceContext) -> None:
        self._context = context

    async def start(self) -> None:
        run_dir = self._context.run_dir
        if run_dir is None:  # started by hand
            return
        behavior = json.loads((run_dir / "behavior.json").read_text()).get(self._context.name, "")
        if behavior.startswith("die"):
            sys.stderr.write("" if behavior == "die mute" else "the reason in a line\n\n")
            sys.stderr.flush()
            sys.exit(9)
        if behavior == "bug":
            raise KeyError(behavior)
        if behavior == "hang":
            await asyncio.Event().wait()
        if behavior == "grandchild":
            grandchild = subprocess.Popen(["sleep", "1000"])  # left behind on purpose
            (run_dir / f"{self._context.name}.grandchild").write_text(str(grandchild.pid))

    async def stop(self) -> None:
        """Nothing is held."""


async def build(context: ServiceContext) -> Misbehaving:
    return Misbehaving(context)


if __name__ == "__main__":
    sys.exit(run_service(sys.argv[1], build, sys.argv[2:]))
