"""Reads and writes the files under RUN/uncertainty that rules are fitted on. Each names the weights it was made with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.data.views import PIXELS_VERSION
from tltrain.evaluation.evaluate import augment_of_views
from tltrain.runs import manifest, run_dir
from tltrain.uncertainty.answers import Answers
from tltrain.uncertainty.strangers import Strangers

WEIGHTS, VIEWS, GROUPS = "weights_sha256", "views", "groups"


def val_file(run: Path, num_views: int = 1) -> Path:
    """The answers on val, by one view of each image or by the mean of several."""
    return run / "uncertainty" / ("val.safetensors" if num_views == 1 else f"val-{num_views}-views.safetensors")


def strangers_file(run: Path) -> Path:
    """The detector of strangers."""
    return run / "uncertainty" / "strangers.safetensors"


def write_val(run: Path, val: Answers, num_views: int = 1) -> None:
    """Keep the answers on val of the run's present weights. Raises OSError."""
    arrays = {"confidence": val.confidence, "own": val.own, "right": val.right.astype(np.uint8)}
    groups = {} if val.num_groups is None else {GROUPS: str(val.num_groups)}
    _write(run, val_file(run, num_views), arrays, _pixels(run, num_views) | groups)


def read_val(run: Path, num_views: int = 1) -> Answers | None:
    """The answers on val. None if they were never worked out, or of other weights. Raises UserError for a damaged file."""
    held = _read(run, val_file(run, num_views), ("confidence", "own", "right"), _pixels(run, num_views))
    if held is None:
        return None
    arrays, said = held
    return Answers(arrays["confidence"], arrays["own"], arrays["right"] > 0, int(said[GROUPS]) if GROUPS in said else None)


def _pixels(run: Path, num_views: int) -> dict[str, str]:
    """Metadata that identifies the pixels of test-time views: their augmentation, and its version."""
    if num_views == 1:
        return {}
    augment = augment_of_views(run_dir.read_recipe(run))
    return {VIEWS: f"{augment} {PIXELS_VERSION.get(augment, 1)}"}


def write_strangers(run: Path, strangers: Strangers) -> None:
    """As `write_val`."""
    _write(run, strangers_file(run), strangers.arrays(), {})


def read_strangers(run: Path) -> Strangers | None:
    """As `read_val`."""
    held = _read(run, strangers_file(run), Strangers.NAMES, {})
    return None if held is None else Strangers.of_arrays(held[0])


def _write(run: Path, file: Path, arrays: Mapping[str, np.ndarray], about: Mapping[str, str]) -> None:
    file.parent.mkdir(exist_ok=True)
    manifest.uncover(run, [file])
    with files.replacing(file) as temporary:
        plain = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(plain, temporary, metadata={WEIGHTS: files.sha256(run_dir.weights_file(run)), **about})
        files.follow_umask(temporary)
    manifest.cover(run, [file])


def _read(
    run: Path, file: Path, names: tuple[str, ...], about: Mapping[str, str]
) -> tuple[dict[str, np.ndarray], Mapping[str, str]] | None:
    """(arrays, metadata). None if the file is absent, or its metadata differ from `about` or from the weights' checksum."""
    if not file.is_file():
        return None
    wanted = {WEIGHTS: files.sha256(run_dir.finished_weights(run)), **about}
    try:
        manifest.check(file)
        with safe_open(str(file), framework="numpy") as held:
            said: dict[str, str] = held.metadata() or {}
            if any(said.get(key) != value for key, value in wanted.items()):
                return None
            return {name: held.get_tensor(name) for name in names}, said
    except (UserError, OSError, SafetensorError) as error:
        if isinstance(error, UserError) and str(file) not in str(error):
            raise  # the manifest itself
        why = "its checksum is not the one in manifest.json" if isinstance(error, UserError) else error
        raise UserError(f"{file} is not as its run wrote it ({why}); delete it: it is made again when it is asked for") from error
