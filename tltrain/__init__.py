"""tltrain fine-tunes image backbones in stages and distils one into another; see the README.

From Python: `run = tltrain.load("runs/a")`, `run.predict("x.jpg")`, `tltrain.train("digits-resnet", seed=1)`, `tltrain.fit("photos")`.
"""

from __future__ import annotations

import warnings
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tltrain.api.fitting import fit
    from tltrain.api.run import Run, load
    from tltrain.api.training import chain, probe, train
    from tltrain.evaluation.predict import Prediction

__version__ = "0.1.0"
__all__ = ["Prediction", "Run", "__version__", "chain", "fit", "load", "probe", "share", "train"]

_HOMES = {
    "Prediction": "tltrain.evaluation.predict",
    "Run": "tltrain.api.run",
    "chain": "tltrain.api.training",
    "fit": "tltrain.api.fitting",
    "load": "tltrain.api.run",
    "probe": "tltrain.api.training",
    "train": "tltrain.api.training",
}


def share() -> Path:
    """The folder that holds accelerate_configs/ and slurm/: inside the package in a wheel, the checkout in an editable install."""
    package = Path(__file__).resolve().parent
    shared = package / "_share"
    return shared if shared.is_dir() else package.parent


def __dir__() -> list[str]:
    """The public names, also those that were not asked for yet."""
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    """The names that need torch, imported when they are first asked for, so that `import tltrain` stays quick."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'tltrain' has no attribute {name!r}")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "IProgress not found")  # tqdm's, in a notebook without widgets: no bar of its is shown
            return getattr(import_module(home), name)
    except RuntimeError as error:
        from tltrain.core.errors import AFTER_THE_END, UserError

        if "shutdown" not in str(error):
            raise
        raise UserError(AFTER_THE_END) from error
