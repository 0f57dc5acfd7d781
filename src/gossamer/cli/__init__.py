"""The command line: one file for each command, and nothing heavy imported before a command runs."""

from ._app import main

__all__ = ["main"]
