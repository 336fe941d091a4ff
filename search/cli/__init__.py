"""The command line: a module for each family of verbs, and shared options. Only this package prints results."""

from .app import app, main

__all__ = ["app", "main"]
