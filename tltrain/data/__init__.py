"""The data pipeline: sources, splits, decoding, augmented views, sample order, loaders."""

from tltrain.data.dataset import DataSplits, Source, SourceKind, Split, class_counts, class_weights, label_weights
from tltrain.data.splits import assign, open_images, outline_images, split_names

__all__ = [
    "DataSplits",
    "Source",
    "SourceKind",
    "Split",
    "assign",
    "class_counts",
    "class_weights",
    "label_weights",
    "open_images",
    "outline_images",
    "split_names",
]
