"""Oona: the event bus of the mesh; typed events, at least once, in order per key, with dead letters."""
