"""The command line: a module for each family of verbs, and what they share. It prints; everything else returns values."""

from .app import main

__all__ = ["main"]
