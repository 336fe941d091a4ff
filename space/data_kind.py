"""What the name of a data set says: where its images come from."""

from __future__ import annotations

from enum import Enum


class DataKind(Enum):
    """Where images come from; the values are how the names of such data begin, or, of the digits, the whole name."""

    DIGITS = "digits"  # scikit-learn's
    TORCH = "torch/"  # torchvision's, by timm
    HUB = "hfds/"  # the Hugging Face hub's, or of that form in a folder, by timm; hfids/ too
    SHARDS = "wds/"  # a folder of WebDataset shards
    GIVEN = "python/"  # data sets or loaders that were given in Python
    FOLDER = ""  # every other name is a path

    @classmethod
    def of(cls, name: str) -> DataKind:
        """The kind of the data that are called `name`; a folder of such a name is reached as ./digits."""
        if name == cls.DIGITS.value:
            return cls.DIGITS
        if name.startswith("hfids/"):  # timm's word for the same rows, read in their order alone
            return cls.HUB
        kinds = cls.TORCH, cls.HUB, cls.SHARDS, cls.GIVEN, cls.FOLDER
        return next(kind for kind in kinds if name.startswith(kind.value))


def split_name(name: str) -> tuple[str, str]:
    """What a name begins with, and the rest: "wds/photos" is ("wds/", "photos"), a plain path ("", path)."""
    kind = DataKind.of(name)
    if kind in (DataKind.HUB, DataKind.SHARDS):
        first, _, rest = name.partition("/")
        return f"{first}/", rest
    return "", name


def is_place(name: str) -> bool:
    """Whether data lie in a folder of this machine, which may move; other names say what they are, not where."""
    kind = DataKind.of(name)
    if kind is DataKind.HUB:
        return split_name(name)[1].startswith("/")
    return kind in (DataKind.FOLDER, DataKind.SHARDS)
