"""``python -m tests.benchmarks.extend --out FILE``: see :mod:`tests.benchmarks.growth.command`."""

import sys

from tests.benchmarks.growth.command import main

if __name__ == "__main__":
    sys.exit(main("extend"))
