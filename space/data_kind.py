"""What the name of a data set says: where its images come from."""

from __future__ import annotations

from enum import Enum


class DataKind(Enum):
    """Where images come from; the values are how the names of such data begin, or, of the digits, the whole name."""

    DIGITS = "digits"  # scikit-learn's
    TORCH = "torch/"  # torchvision's, by timm
    HUB = "hfds/"  # the Hugging Face hub's, by timm
    GIVEN = "python/"  # data sets or loaders that were given in Python
    FOLDER = ""  # every other name is a path

    @classmethod
    def of(cls, name: str) -> DataKind:
        """The kind of the data that are called `name`; a folder of such a name is reached as ./digits."""
        if name == cls.DIGITS.value:
            return cls.DIGITS
        return next(kind for kind in (cls.TORCH, cls.HUB, cls.GIVEN, cls.FOLDER) if name.startswith(kind.value))
