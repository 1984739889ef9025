"""Tamiyo: decides if, when, where and how a network adapts, and explains every decision."""
