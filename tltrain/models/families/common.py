"""Shared by families: steps of blocks that are named by hand (defined in tracing, which needs them too), and a check of a net."""

from torch import nn

from tltrain.models.tracing.steps import head_block, run_module

__all__ = ["head_block", "is_convolutional", "run_module"]


def is_convolutional(net: nn.Module) -> bool:
    """Whether the network has more convolutions than the few of a stem: only then the memory format matters."""
    return sum(isinstance(m, nn.Conv2d) and m.kernel_size != (1, 1) for m in net.modules()) > 4
