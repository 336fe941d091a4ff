"""Data sets opened by plain keyword arguments, for tests."""

from dataclasses import fields
from typing import Any

from poolshare.supernet.data import Data, ImageFormat, Place
from poolshare.supernet.data import open_data as open_place
from poolshare.supernet.data.opening import open_source as open_images
from poolshare.supernet.data.sources import Found


def _taken(kind: type, options: dict[str, Any]) -> dict[str, Any]:
    return {field.name: options.pop(field.name) for field in fields(kind) if field.name in options}


def open_data(name: str, **options: Any) -> Data:
    """`name` and options: fields of `Place` and `ImageFormat`, and arguments of `open_data`."""
    place, images = Place(name, **_taken(Place, options)), ImageFormat(**_taken(ImageFormat, options))
    return open_place(place, images, **options)


def open_source(name: str, **options: Any) -> Found:
    """The same of `open_source`; the options are fields of `Place`."""
    return open_images(Place(name, **options))
