"""Extending a network that is already trained (GROWTH, section 6); the machinery is that of ``growth``."""
