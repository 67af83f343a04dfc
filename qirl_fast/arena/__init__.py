"""Blind votes of people between models, side by side: see docs/arena.md."""
