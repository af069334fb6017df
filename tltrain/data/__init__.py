"""Where images come from: sources, splits, decoding, views, order, loaders."""

from tltrain.data.dataset import DataSplits, Source, SourceKind, Split, class_weights
from tltrain.data.splits import open_images, outline_images

__all__ = ["DataSplits", "Source", "SourceKind", "Split", "class_weights", "open_images", "outline_images"]
