"""The command line: a module for each family of verbs, and shared options. Only this package prints results."""

from .app import main

__all__ = ["main"]
