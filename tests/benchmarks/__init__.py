"""Measurements against the numbers of the architecture."""
