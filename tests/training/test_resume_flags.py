"""Start-up flags that decide bits: a run that is started again without them keeps those that it began with."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HEAD
from torch import Tensor

from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.core.recipe import Recipe
from tltrain.data.views import PIXELS_VERSION
from tltrain.distributed.runtime import Runtime
from tltrain.distributed.signals import StopSignal
from tltrain.models.chain import Chain
from tltrain.training.run import train
from tltrain.training.setup import DEVICE_BATCH, Run, open_run

Made = Callable[..., Recipe]


def _kept(run: Path) -> dict[str, Any]:
    kept: dict[str, Any] = json.loads((run / "env.json").read_text())["kept"]
    return kept


def _stop_after_two(stage: str, step: int) -> None:
    """A signal to this process."""
    if step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Images of each micro-batch that a network was trained on."""
    sizes: list[int] = []
    forward = Chain.forward

    def counted(self: Chain, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        if torch.is_grad_enabled() and self.training:  # Grad-CAM of the report runs the network in eval mode
            sizes.append(len(x))
        return forward(self, x, start, stop)

    monkeypatch.setattr(Chain, "forward", counted)
    return sizes


@pytest.mark.parametrize(("flag", "then", "sizes"), [(5, None, [4, 4, 4, 4]), (5, 8, [8, 8]), (None, None, [16])])
def test_a_resumed_run_keeps_its_micro_batches(
    flag: int | None,
    then: int | None,
    sizes: list[int],
    seen: list[int],
    made_recipe: Made,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unless it is told other ones: 16 images a step, in parts that are as even as they can be."""
    recipe, run = made_recipe(stages=[HEAD | {"steps": 5}], data={"eval_limit": 16}), tmp_path / "run"
    assert train(recipe, RunFlags(folder=run, workers=0, max_device_batch=flag), _stop_after_two)["outcome"] == "stopped"
    first = [4, 4, 4, 4] if flag == 5 else [16]
    taken = len(seen) // len(first)
    assert 0 < taken < 5
    assert seen == first * taken
    assert _kept(run) == {"max_device_batch": flag or DEVICE_BATCH, "compile": False, "pixels": PIXELS_VERSION, "mixes_by_view": True}
    seen.clear()
    assert train(recipe, RunFlags(folder=run, workers=0, max_device_batch=then))["outcome"] == "finished"
    assert seen == sizes * (5 - taken)
    assert _kept(run) == {
        "max_device_batch": then or flag or DEVICE_BATCH,
        "compile": False,
        "pixels": PIXELS_VERSION,
        "mixes_by_view": True,
    }


def test_a_run_that_began_with_other_pixels_is_not_resumed(made_recipe: Made, tmp_path: Path) -> None:
    """Strong views had black corners once: half of the run on those, half on others would be neither."""
    recipe, run = made_recipe(stages=[HEAD | {"steps": 5, "augment": "strong"}], data={"eval_limit": 16}), tmp_path / "run"
    assert train(recipe, RunFlags(folder=run, workers=0), _stop_after_two)["outcome"] == "stopped"
    known = json.loads((run / "env.json").read_text())
    pixels = known["kept"].pop("pixels")
    assert pixels["strong"] == PIXELS_VERSION["strong"]
    (run / "manifest.json").unlink(missing_ok=True)
    (run / "env.json").write_text(json.dumps(known))
    with pytest.raises(
        UserError, match="whose views of augment: strong have other pixels; finish it with that version, or begin a new run"
    ):
        train(recipe, RunFlags(folder=run, workers=0))
    known["kept"]["pixels"] = pixels
    (run / "env.json").write_text(json.dumps(known))
    assert train(recipe, RunFlags(folder=run, workers=0))["outcome"] == "finished"


def test_a_run_of_views_that_have_not_changed_is_resumed_by_any_version(made_recipe: Made, tmp_path: Path) -> None:
    recipe, run = made_recipe(stages=[HEAD | {"steps": 5, "augment": "light"}], data={"eval_limit": 16}), tmp_path / "run"
    train(recipe, RunFlags(folder=run, workers=0), _stop_after_two)
    known = json.loads((run / "env.json").read_text())
    del known["kept"]["pixels"]
    (run / "manifest.json").unlink(missing_ok=True)
    (run / "env.json").write_text(json.dumps(known))
    assert train(recipe, RunFlags(folder=run, workers=0))["outcome"] == "finished"


def _opened(recipe: Recipe, start: RunFlags) -> Run:
    """A run before its first step, as this start would go on with it."""
    assert start.folder is not None
    run = open_run(start.folder, recipe, start, Runtime(recipe.deterministic), Console(False), StopSignal())
    run.watch.close()
    return run


def test_a_resumed_run_stays_compiled(made_recipe: Made, tmp_path: Path) -> None:
    """Without a step, and so without compiling."""
    recipe, run = made_recipe(), tmp_path / "run"
    assert _opened(recipe, RunFlags(folder=run, compile=True)).start.compile
    assert _kept(run)["compile"]
    again = RunFlags(folder=run, take_over=True)
    assert not again.compile
    assert _opened(recipe, again).start.compile
    assert _kept(run)["compile"]
    with pytest.raises(UserError, match="--compile and --recompute exclude each other"):
        _opened(recipe, RunFlags(folder=run, take_over=True, recompute=True))
    assert not _opened(recipe, RunFlags(folder=tmp_path / "other")).start.compile
