"""Any network becomes a list of blocks: by tracing it with torch.fx, else by its containers of modules."""

from tltrain.models.tracing.structure import grouped_blocks
from tltrain.models.tracing.traced import CannotCut, traced_blocks

__all__ = ["CannotCut", "grouped_blocks", "traced_blocks"]
