"""Esper's services.

Importing this package puts the generated contracts (``services/contracts``) first on ``sys.path``, so
that ``import esper.urza.v1...`` finds them in ``python train.py`` from the repository root, in
``python -m services.<name>`` and in forkserver children alike, without an install step.
"""

import sys
from pathlib import Path

_CONTRACTS = str(Path(__file__).resolve().parent / "contracts")
if _CONTRACTS not in sys.path:
    sys.path.insert(0, _CONTRACTS)
