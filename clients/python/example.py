"""Lists the blueprints and seeds of a live mesh, then follows its runs for a few messages.

python example.py runs/latest/addresses.json [MESSAGES]
"""

from __future__ import annotations

import asyncio
import sys

from grpclib.exceptions import GRPCError

from esper_client import Mesh, kasmina, reason_of, tolaria, urza


async def main(addresses: str, messages: int) -> None:
    """Prints a line for each blueprint, seed and change of a run."""
    async with Mesh.from_file(addresses) as mesh:
        library = await mesh.blueprints.list_blueprints(urza.ListBlueprintsRequest(page_size=1000), timeout=10.0)
        for blueprint in library.blueprints:
            family = blueprint.spec.family if blueprint.spec else ""
            print(f"blueprint {blueprint.name} {family}")

        everywhere = kasmina.ListSeedsRequest(run="runs/-", page_size=1000)
        for seed in (await mesh.seeds.list_seeds(everywhere, timeout=10.0)).seeds:
            print(f"seed {seed.name} {seed.slot} {seed.state.name}")

        # The timeout is of the whole stream.
        async for update in mesh.training.watch_run(tolaria.WatchRunRequest(), timeout=60.0):
            if update.run is None:  # a bookmark: all that exists has been told
                print(f"watch {update.change.name}")
            else:
                run = update.run
                print(f"watch {update.change.name} {run.name} {run.state.name} epoch {run.epoch}/{run.epochs}")
            messages -= 1
            if messages == 0:
                break


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: example.py ADDRESSES.JSON [MESSAGES]")
    try:
        asyncio.run(main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else 5))
    except GRPCError as error:
        sys.exit(f"example.py: {error.status.name}: {error.message} (reason: {reason_of(error)})")
    except OSError as error:
        sys.exit(f"example.py: {error}")
