"""``python -m tests.benchmarks.growth --out FILE``: see :mod:`tests.benchmarks.growth.command`."""

import sys

from tests.benchmarks.growth.command import main

if __name__ == "__main__":
    sys.exit(main("growth"))
