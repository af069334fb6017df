"""tltrain from Python, as a notebook uses it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HEAD
from digit_files import digit_folder, digit_image, run_with_weights

import tltrain
from tltrain.commands.cache import verify
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.evaluation.evaluate import evaluate
from tltrain.training.run import train

Made = Callable[..., Recipe]


def test_import_is_quick_and_brings_no_torch() -> None:
    code = "import sys, tltrain; print('torch' in sys.modules, 'numpy' in sys.modules, tltrain.load.__name__, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False", "load", "True"]
    with pytest.raises(AttributeError, match="has no attribute 'lode'"):
        _ = tltrain.lode


def test_names_and_parameters_are_there_to_be_seen() -> None:
    """What `dir`, the completion of a notebook and `tltrain.train?` show; nothing heavy is imported for the names."""
    code = "import sys, tltrain; print(*dir(tltrain)); print('torch' in sys.modules)"
    names, torch_came = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    public = {"Prediction", "Run", "chain", "fit", "load", "probe", "share", "train"}
    assert {name for name in names.split() if not name.startswith("_")} == public
    assert torch_came == "False"
    for name in sorted(public - {"Run", "Prediction", "share"}):
        function = getattr(tltrain, name)
        doc = inspect.getdoc(function) or ""
        unsaid = [p for p in inspect.signature(function).parameters if p not in doc]
        assert not unsaid, f"{name} has {unsaid}, of which its docstring says nothing"
        assert "Raises UserError" in doc
    assert {"folder", "data", "backbone", "stages", "workers"} <= inspect.signature(tltrain.train).parameters.keys()


def test_data_may_be_a_folder(made_recipe: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the data is 'nowhere', which is no folder"):
        tltrain.train(made_recipe(), data="nowhere", folder=tmp_path / "run")
    photos = digit_folder(tmp_path / "photos", 2)
    run = tltrain.train(made_recipe(), data=photos, folder=tmp_path / "run", workers=0, smoke=True)
    assert run.recipe.data.source == f"folder:{photos}"
    assert run.recipe.data.size == 32, "the recipe's other values stay"


def test_a_run_is_opened_and_asked(finished_run: Path, tmp_path: Path) -> None:
    run = tltrain.load(str(finished_run))
    assert run.recipe.name == "micro"
    assert run.metrics == json.loads((finished_run / "test_metrics.json").read_text())
    assert run.history[-1]["kind"] == "test"
    assert run.outcome["outcome"] == "finished"
    assert run.classes == tuple(str(i) for i in range(10))
    digit_image(5).save(tmp_path / "x.png")
    one = run.predict(tmp_path / "x.png")
    assert one.label in run.classes
    assert sum(share for _, share in run.predict(str(tmp_path / "x.png"), top=10).top) == pytest.approx(1)
    several = run.predict([tmp_path / "x.png", digit_image(5), str(tmp_path / "none.png")])
    for other in several[:2]:  # in a batch of two, which rounds otherwise
        assert [name for name, _ in other.top] == [name for name, _ in one.top]
        assert [share for _, share in other.top] == pytest.approx([share for _, share in one.top], rel=1e-4)
    assert several[2].problem == "No such file or directory"
    assert "finished" in repr(run)


def test_the_model_is_a_plain_module_of_images(made_recipe: Made, tmp_path: Path) -> None:
    run = tltrain.load(run_with_weights(tmp_path / "run", made_recipe(), tuple("abcdefg")))
    assert isinstance(run.model, torch.nn.Module)
    assert not run.model.training
    x = torch.rand(3, 3, 32, 32)
    assert run.model(x).shape == (3, 7)
    assert not run.model(x).requires_grad
    picture = (x[0] * 255).round().to(torch.uint8)
    top = run.predict(list((x * 255).round().to(torch.uint8)), top=1)[0]
    assert run.classes[int(run.model(picture[None]).argmax())] == top.label


def test_train_takes_a_recipe_and_overrides(made_recipe: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more: dict[str, Any] = {"store": "never", "stages.1.lr": 0.003}
    run = tltrain.train(made_recipe(), folder=str(tmp_path / "run"), workers=0, data={"per_class": 3}, **more)
    assert "store is now called cache" in capsys.readouterr().err
    assert run.path == tmp_path / "run"
    assert run.recipe.data.per_class == 3
    assert run.recipe.data.source == "digits"
    assert [stage.lr for stage in run.recipe.stages] == [0.01, 0.003]
    assert run.metrics["n"] == 40


@pytest.mark.parametrize("deterministic", [True, False])
def test_torchs_own_switches_are_as_before(
    deterministic: bool,
    made_recipe: Made,
    finished_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """After a run, an evaluation, and rows of a store that are computed again."""
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    before = (not deterministic, deterministic, not deterministic, deterministic)

    def switches() -> tuple[bool, ...]:
        settings: Any = torch.utils.deterministic
        kernels = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
        return (*kernels, settings.fill_uninitialized_memory, torch.backends.cuda.matmul.allow_tf32)

    def set_switches(values: tuple[bool, ...]) -> None:
        torch.use_deterministic_algorithms(values[0])
        torch.backends.cudnn.benchmark, torch.utils.deterministic.fill_uninitialized_memory = values[1:3]  # type: ignore[attr-defined]
        torch.backends.cuda.matmul.allow_tf32 = values[3]

    own = switches()
    set_switches(before)
    try:
        stage = HEAD | {"views": 1}
        train(made_recipe(stages=[stage], deterministic=deterministic), RunFlags(folder=tmp_path / "run", workers=0, cache="always"))
        assert switches() == before
        evaluate(finished_run, None, "test", 128)
        assert switches() == before
        assert verify([], 2, 0) == 0
        assert "2 equal bit for bit" in capsys.readouterr().out
        assert switches() == before
    finally:
        set_switches(own)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        ({"stages.2.lr": 1}, "no 'stages.2.lr'"),
        ({"stages.0.lrr": 1}, "no 'stages.0.lrr'"),
        ({"stages.0.lr": -1}, "greater than 0"),
        ({"bach": 8}, "'bach' is neither"),
        ({"keep": 0}, "--keep is 0"),
        ({"data": {"sorce": "x"}}, "did you mean source"),
    ],
)
def test_a_mistake_in_the_overrides_is_said(overrides: dict[str, Any], says: str, made_recipe: Made, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says):
        tltrain.train(made_recipe(), folder=tmp_path / "run", **overrides)
    assert not (tmp_path / "run").exists()


def test_a_failed_run_says_why(made_recipe: Made, tmp_path: Path) -> None:
    stage = {"name": "all", "unfreeze": "all", "steps": 4, "lr": 1e30, "optimizer": "sgd", "schedule": "constant"}
    with pytest.raises(UserError, match=r"the run failed: .*learning rate"):
        tltrain.train(made_recipe().model_dump(mode="json") | {"stages": [stage]}, folder=tmp_path / "run", workers=0)
    assert tltrain.load(tmp_path / "run").outcome["outcome"] == "failed"
