"""Tezzeret: turns blueprints into kernels, in sandboxed workers, without ever pausing a training step."""
