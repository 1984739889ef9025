"""Where torch computes in this process, and how: so that two runs of one configuration are equal."""

from __future__ import annotations

import torch

from services.chassis.config.schema import TrainingConfig


def choose(training: TrainingConfig) -> torch.device:
    """Where to train, with everything set for the process that makes two runs equal."""
    wanted = training.device
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(training.threads)
    # On a GPU some backward passes have no deterministic form: they warn, and the run goes on.
    # Not torch.use_deterministic_algorithms, which means the same and imports the compiler for it: seconds.
    torch.set_deterministic_debug_mode("warn" if wanted == "cuda" else "error")
    # With it comes a fill of every new tensor with NaN, which costs 4 % of the steps of a small network.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # torch makes it so late
    return torch.device(wanted)
