"""Tolaria: the training orchestrator. It owns the loop, the optimizer, the clock, checkpoints and rollback."""
