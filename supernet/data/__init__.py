"""Images and labels: where they come from, how they are split, what a model sees of them."""

from .splits import Batches, Data, open_data

__all__ = ["Batches", "Data", "open_data"]
