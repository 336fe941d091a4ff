"""What is written to a terminal: text from anywhere stays text, whatever names of files and data sets hold."""

from __future__ import annotations

import codecs
from typing import Any, TextIO

from rich.console import Console

from poolshare.space.processes import launched_rank

# What is drawn where the terminal's encoding has no such letters; each is one column wide, as they are.
PLAIN = {
    "█": "#",
    "┐": ".",
    "┤": "|",
    "┘": "'",
    "╶": "-",
    "│": "|",
    "─": "-",
    "→": ">",
    "·": ".",
    "×": "x",
    "…": ".",
    "τ": "t",
}


def _plain(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(PLAIN.get(letter, "?") for letter in error.object[error.start : error.end]), error.end


codecs.register_error("poolshare.plain", _plain)


def never_fail(stream: TextIO) -> None:
    """Have a text stream write any text, with other letters in place of those that its encoding lacks."""
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="poolshare.plain")


def printable(text: str) -> str:
    """The text with its control characters written out, line feeds and tabulators excepted.

    Otherwise a file's name could move the cursor, recolour or clear the terminal.
    """
    return "".join(
        letter if letter.isprintable() or letter in "\n\t" else letter.encode("unicode_escape").decode()
        for letter in text
    )


class PlainConsole(Console):
    """A rich console that reads no markup in what it prints, highlights nothing, and leaves lines of text whole."""

    def __init__(self, **options: Any) -> None:
        super().__init__(highlight=False, markup=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich does; text is made `printable` first."""
        whole = {"soft_wrap": all(isinstance(part, str) for part in objects)}  # paths and commands are to be copied
        super().print(*(printable(part) if isinstance(part, str) else part for part in objects), **whole | options)


def say(console: Console, text: str) -> None:
    """Print text as it is on any console: without reading markup in it, and in whole lines."""
    console.print(text, markup=False, soft_wrap=True)


def progress_console(quiet: bool) -> PlainConsole:
    """Where progress goes: standard error; nowhere from the processes that torchrun started to help the first."""
    return PlainConsole(stderr=True, quiet=quiet or launched_rank() > 0)
