"""What is written to a terminal: text from anywhere stays text, whatever names of files and data sets hold."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def printable(text: str) -> str:
    """The text with its control characters written out, line feeds and tabulators excepted.

    Otherwise a file's name could move the cursor, recolour or clear the terminal.
    """
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


class PlainConsole(Console):
    """A rich console that reads no markup in what it prints and highlights nothing."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does; text is made `printable` first."""
        super().print(*(printable(part) if isinstance(part, str) else part for part in objects), **options)
