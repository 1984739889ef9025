"""Resource names of a run and of what is in it. Torch-free."""

from __future__ import annotations


def bare(name: str) -> str:
    """The last part of a resource name: ``runs/r/slots/conv1`` gives ``conv1``."""
    return name.rsplit("/", 1)[-1]


def run_name(run: str) -> str:
    """Resource name of a run."""
    return f"runs/{run}"


def slot_name(run: str, slot: str) -> str:
    """Resource name of a slot."""
    return f"runs/{run}/slots/{slot}"


def seed_name(run: str, seed: str) -> str:
    """Resource name of a seed."""
    return f"runs/{run}/seeds/{seed}"
