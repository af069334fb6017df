"""Any network becomes a list of blocks: by tracing it with torch.fx, else by its containers of modules."""

from tltrain.models.tracing.structure import grouped_blocks
from tltrain.models.tracing.traced import traced_blocks
from tltrain.models.tracing.tracer import CannotCut

__all__ = ["CannotCut", "grouped_blocks", "traced_blocks"]
