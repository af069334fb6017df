"""The files of a run that hold what its rules are fitted on. They name the weights they were made with, and are covered by the manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.runs import manifest, run_dir
from tltrain.uncertainty.answers import Answers
from tltrain.uncertainty.strangers import Strangers

WEIGHTS = "weights_sha256"


def val_file(run: Path, num_views: int = 1) -> Path:
    """The answers on val, by one view of each image or by the mean of several."""
    return run / "uncertainty" / ("val.safetensors" if num_views == 1 else f"val-{num_views}-views.safetensors")


def strangers_file(run: Path) -> Path:
    """What a run's features are like."""
    return run / "uncertainty" / "strangers.safetensors"


def write_val(run: Path, val: Answers, num_views: int = 1) -> None:
    """Keep the answers on val of the run's present weights. Raises OSError."""
    _write(run, val_file(run, num_views), {"confidence": val.confidence, "own": val.own, "right": val.right.astype(np.uint8)})


def read_val(run: Path, num_views: int = 1) -> Answers | None:
    """The answers on val. None if they were never worked out, or of other weights. Raises UserError for a damaged file."""
    held = _read(run, val_file(run, num_views), ("confidence", "own", "right"))
    return None if held is None else Answers(held["confidence"], held["own"], held["right"] > 0)


def write_strangers(run: Path, strangers: Strangers) -> None:
    """As `write_val`."""
    _write(run, strangers_file(run), strangers.arrays())


def read_strangers(run: Path) -> Strangers | None:
    """As `read_val`."""
    held = _read(run, strangers_file(run), Strangers.NAMES)
    return None if held is None else Strangers.of_arrays(held)


def _write(run: Path, file: Path, arrays: Mapping[str, np.ndarray]) -> None:
    file.parent.mkdir(exist_ok=True)
    manifest.uncover(run, [file])
    with files.replacing(file) as temporary:
        plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(plain, temporary, metadata={WEIGHTS: files.sha256(run_dir.weights_file(run))})
        files.follow_umask(temporary)
    manifest.cover(run, [file])


def _read(run: Path, file: Path, names: tuple[str, ...]) -> dict[str, np.ndarray] | None:
    if not file.is_file():
        return None
    manifest.check(file)
    try:
        with safe_open(str(file), framework="numpy") as held:
            if (held.metadata() or {}).get(WEIGHTS) != files.sha256(run_dir.finished_weights(run)):
                return None
            return {name: held.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} is damaged ({error}); delete it: it is made again when it is asked for") from error
