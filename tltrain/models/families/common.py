"""Block steps that families share, for blocks that are named by hand. What traces a network needs them too, so they live there."""

from tltrain.models.tracing.steps import head_block, run_module

__all__ = ["head_block", "run_module"]
