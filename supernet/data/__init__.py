"""Images and labels: where they come from, how they are split, what a model sees of them."""

from .opening import open_data, open_pictures, open_tests
from .sources import Place
from .splits import Batches, Data
from .transforms import ImageFormat

__all__ = ["Batches", "Data", "ImageFormat", "Place", "open_data", "open_pictures", "open_tests"]
