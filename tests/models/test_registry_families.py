"""A family of networks that another package brings, without a line of ours: one file, one entry point.

It is the one of docs/backbones.md, whose blocks have no steps. A second family of the same package is the same net with steps.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from digit_files import digit_image
from foreign_package import install
from safetensors.torch import load_file
from world_trials import stop_and_go_on

from benchmarks import trials, world
from benchmarks.trials import distance
from benchmarks.world import Trial
from tltrain.core import registry
from tltrain.core.errors import UserError
from tltrain.core.recipe import Backbone
from tltrain.models import factory
from tltrain.models.family import Family

ROOT = Path(__file__).resolve().parents[2]
TOY = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "backbones.md").read_text(encoding="utf-8"), re.DOTALL)[0]
STEPPED = """
from functools import partial

from tltrain.models.families.common import head_block, run_module
from tltrain.models.chain import Block
from toy_backbones import Toy


class Stepped(Toy):
    def describe(self):
        return {"toy-stepped": "the same, block by block"}

    def blocks(self, net, card, dropout):
        body = [Block(path, (path,), partial(run_module, path)) for path in ("stem", "middle", "last")]
        return [*body, head_block(self.head_of(card), dropout)]


FAMILY = Stepped()
"""
HEAD = {"name": "head", "unfreeze": "head", "steps": 4, "lr": 0.05, "views": 1, "augment": "none", "carry": "last"}
ALL = {"name": "all", "unfreeze": "all", "steps": 4, "lr": 0.01, "layer_decay": 0.8, "norm_stats": "frozen", "carry": "last"}
MIDDLE = ALL | {"name": "mid", "unfreeze": "middle"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site-packages")
    points = "[tltrain.families]\ntoy = toy_backbones:FAMILY\nstepped = toy_stepped:FAMILY\n"
    return install(folder, "toy_backbones", {"toy_backbones": TOY, "toy_stepped": STEPPED}, points)


@pytest.fixture
def fresh_registry() -> Iterator[None]:
    registry._others.cache_clear()
    yield
    registry._others.cache_clear()


@pytest.fixture
def installed(site: Path, monkeypatch: pytest.MonkeyPatch, fresh_registry: None) -> None:
    """The package stands on the path of this process, and of the worlds that it starts."""
    monkeypatch.syspath_prepend(str(site))


def recipe(name: str = "toy-cnn", *stages: dict[str, Any], **backbone: Any) -> dict[str, Any]:
    return trials.recipe(backbone={"name": name, **backbone}, stages=list(stages or (HEAD, MIDDLE, ALL)))


def finish(tmp_path: Path, folder: str, spec: dict[str, Any], num: int = 1, strategy: str = "ddp", **start: Any) -> Path:
    return world.finish(
        Trial(spec, str(tmp_path / folder), num, strategy, {"cache": "never"} | start, float64=strategy in ("ddp", "fsdp2"))
    )


_COMMANDS = """
import sys
sys.path.insert(0, sys.argv[1])
from tltrain.cli.main import main
file, images = sys.argv[2:]
for words in (
    ["recipes", "--backbones"],
    ["plan", file],
    ["train", file, "--backbone.name", "toy-cn"],
    ["train", file, "--cache", "always"],
    ["train", file, "--recompute"],
    ["train", file, "--folder", "run"],
    ["train", file, "--folder", "run"],
    ["evaluate", "run"],
    ["predict", "run", images],
    ["export", "run", "--to", "torch-export"],
    ["export", "run", "--to", "hf"],
    ["export", "run", "--to", "torchvision"],
):
    print("$", *words, flush=True)
    print("exit", main(words), flush=True)
print("transformers" in sys.modules)
"""


def test_another_package_is_used_as_ours_are(site: Path, tmp_path: Path) -> None:
    (tmp_path / "toy.yaml").write_text(json.dumps(recipe("toy-cnn", HEAD, ALL)))
    digit_image(3).save(tmp_path / "x.png")
    command = [sys.executable, "-c", _COMMANDS, str(site), "toy.yaml", "x.png"]
    done = subprocess.run(command, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=300)
    assert done.returncode == 0, done.stdout
    listed, planned, unknown, stored, recomputed, trained, again, evaluated, predicted, exported, hf, vision = done.stdout.split("$ ")[1:]
    assert "toy-cnn" in listed
    assert "a CNN of three convolutions, for 32 px" in listed
    assert "resnet50" in listed
    assert "head: features before head not stored: blocks of this network cannot run one by one" in " ".join(planned.split())
    assert "backbone.name is 'toy-cn'; did you mean toy-cnn?" in unknown
    assert "--cache always, but stage head cannot be cached: blocks of this network cannot run one by one; or take --cache auto" in stored
    assert "--recompute works block by block, and blocks of this network cannot run one by one; drop it" in recomputed
    for refused in (unknown, stored, recomputed):
        assert "exit 2" in refused
    assert "is finished already" in again
    for said in (listed, planned, trained, again, evaluated, predicted, exported):
        assert "exit 0" in said, said
    assert json.loads((tmp_path / "run" / "test_metrics.json").read_text())["n"] > 0
    assert (tmp_path / "run" / "export" / "torch-export" / "model.pt2").is_file()
    assert "transformers has no class for toy-cnn; export it --to onnx or torch-export" in hf
    assert "torchvision has no class that takes the weights of toy-cnn" in vision


@pytest.mark.usefixtures("installed")
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path: Path) -> None:
    spec = recipe(dropout=0.2)
    whole = finish(tmp_path, "whole", spec)
    run = stop_and_go_on(Trial(spec, str(tmp_path / "run"), start={"cache": "never"}, float64=True), 6)
    assert trials.differences(run, whole) == []


@pytest.mark.usefixtures("installed")
def test_blocks_without_steps_train_as_blocks_with_steps_do(tmp_path: Path) -> None:
    """Frozen blocks, learning rates by depth and dropout: the same weights; and features that are stored change nothing."""
    whole = finish(tmp_path, "whole", recipe(dropout=0.2))
    stepped = finish(tmp_path, "stepped", recipe("toy-stepped", dropout=0.2))
    assert distance(whole, stepped) < 1e-9
    stored = finish(tmp_path, "stored", recipe("toy-stepped", HEAD, HEAD | {"name": "more", "unfreeze": "middle"}), cache="always")
    computed = finish(tmp_path, "computed", recipe("toy-stepped", HEAD, HEAD | {"name": "more", "unfreeze": "middle"}))
    assert "read from" in (stored / "plan.txt").read_text()
    assert trials.differences(stored, computed) == []
    head, middle, end = (load_file(whole / "stages" / name / "weights.safetensors") for name in ("0-head", "1-mid", "2-all"))
    final = load_file(whole / "weights.safetensors")
    assert all(torch.equal(final[name], end[name]) for name in end), "what is compared above has been trained in all stages"
    assert torch.equal(head["stem.0.weight"], middle["stem.0.weight"])
    assert not torch.equal(middle["stem.0.weight"], end["stem.0.weight"])
    assert not torch.equal(head["middle.0.weight"], middle["middle.0.weight"])
    assert torch.equal(head["stem.1.running_mean"], end["stem.1.running_mean"]), "norm_stats: frozen"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow)])
def test_two_processes_train_as_one_does(strategy: str, tmp_path: Path) -> None:
    assert distance(finish(tmp_path, "two", recipe(), 2, strategy), finish(tmp_path, "one", recipe())) < 1e-9


@pytest.mark.slow
@pytest.mark.usefixtures("installed")
def test_zero_trains_as_one_process_does(tmp_path: Path) -> None:
    one = world.finish(Trial(recipe(), str(tmp_path / "one")))
    assert distance(finish(tmp_path, "two", recipe(), 2, "zero3"), one) < 1e-3


@pytest.mark.usefixtures("installed")
def test_the_logits_of_a_teacher_that_runs_whole_are_stored(tmp_path: Path) -> None:
    teacher = finish(tmp_path, "teacher", recipe("toy-cnn", HEAD))
    spec = recipe("resnet-micro", HEAD | {"unfreeze": "all"}) | {"distill": {"teacher": {"weights": str(teacher)}}}
    stored, computed = finish(tmp_path, "stored", spec, cache="always"), finish(tmp_path, "computed", spec)
    assert "the teacher's logits, 1 view" in (stored / "plan.txt").read_text()
    assert trials.differences(stored, computed) == []


@pytest.mark.usefixtures("installed")
def test_weights_of_a_package_that_is_gone_are_refused(site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "w.safetensors"
    loaded = factory.load(Backbone(name="toy-cnn"), classes=("a", "b"), size=None, resize=None, head="new", seed=0)
    factory.write_weights(file, loaded.chain.net.state_dict(), loaded.card)
    assert factory.skeleton(Backbone(weights=str(file)), 2, None, None).family is loaded.family
    with pytest.raises(UserError, match="are a toy-cnn; set the name to toy-cnn or null"):
        factory.skeleton(Backbone(name="toy-stepped", weights=str(file)), 2, None, None)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(site)])
    registry._others.cache_clear()
    with pytest.raises(UserError, match=r"the weights .*w\.safetensors are a toy-cnn, which no package here provides; install the one"):
        factory.skeleton(Backbone(weights=str(file)), 2, None, None)


@pytest.mark.usefixtures("fresh_registry")
def test_a_family_that_lacks_an_answer_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        tmp_path, "half", {"half_a_family": TOY.replace("def build(", "def builds(")}, "[tltrain.families]\nhalf = half_a_family:FAMILY\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(
        UserError, match=r"half_a_family:FAMILY of another package provides, and it cannot be imported: .* abstract .*build"
    ):
        factory.skeleton(Backbone(name="toy-cnn"), 2, None, None)
    factory.skeleton(Backbone(name="resnet-micro"), 2, None, None)  # ours do without it


def test_our_own_families_are_what_they_say() -> None:
    """mypy sees that they keep to the protocol; the registry's strings it does not see."""
    for name in registry.KINDS["families"]:
        assert Family in type(registry.find("families", name, "")).__mro__


def test_transformers_is_loaded_for_a_vit_alone_and_timm_for_neither(tmp_path: Path) -> None:
    (tmp_path / "micro.yaml").write_text(json.dumps(trials.recipe(stages=[HEAD])))
    code = """
import sys
import tltrain.api.fitting
import tltrain.api.training
from tltrain.cli.main import main
assert main(["recipes", "--backbones"]) == 0
assert main(["train", "micro.yaml", "--folder", "run"]) == 0
assert main(["predict", "run", "run/preview.png"]) == 0
assert not {"transformers", "timm"} & set(sys.modules)
assert main(["plan", "micro.yaml", "--backbone.name", "vit-tiny", "--backbone.weights", "None"]) == 0
assert "transformers" in sys.modules and "timm" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
