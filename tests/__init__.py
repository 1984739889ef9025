"""Tests of Esper."""
