"""Kasmina: the execution layer that grafts seeds into a network while it trains."""
