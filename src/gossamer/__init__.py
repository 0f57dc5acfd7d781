"""Gossamer: make a language model faster and lighter, show what that cost, and run it."""

__version__ = "0.1.0"
