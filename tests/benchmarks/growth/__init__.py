"""What growth is worth: the proof, with every control (issue 5, GROWTH sections 2b, 5 and 6)."""
