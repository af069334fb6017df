"""An image's features are the same wherever it stands in a batch, with as many threads as there may be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import slow

TESTS = Path(__file__).parents[1]
PREPARE = """
import sys, torch
from pathlib import Path
from contextlib import nullcontext
sys.path.insert(0, sys.argv[1])
torch.set_num_threads(int(sys.argv[2]))
from cut_runs import same_stored_computed_and_resumed, stages_of
from conftest import made_recipe
from hf_nets import config_of, net_of, saved
from tltrain.cache.planner import finds_place_matters, prefix_of
from tltrain.core.recipe import Backbone
from tltrain.models.factory import load
folder = Path(sys.argv[3])
"""
TURNED = """
CLASSES = ("a", "b")
for name in ("dinov2", "cvt", "convnext"):
    weights = Backbone(weights=str(saved(net_of(config_of(name)), folder / name)))
    loaded = load(weights, classes=CLASSES, size=None, resize=None, head="new", seed=0)
    loaded.chain.place_matters = finds_place_matters(loaded, torch.device("cpu"), nullcontext)
    size = loaded.preprocess.size
    images = torch.randint(0, 256, (40, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    frozen = prefix_of(loaded.chain, len(loaded.chain.blocks) - 1, "no", True, nullcontext)
    same = torch.equal(frozen(images), frozen(images.flip(0)).flip(0))
    print(name, "same" if same else "other", "one by one" if frozen.chunk == 1 else "in chunks")
"""
TRAINED = """
weights = saved(net_of(config_of("dinov2")), folder / "weights")
same_stored_computed_and_resumed(made_recipe(backbone={"weights": str(weights)}, stages=stages_of("layer.1")), folder)
same_stored_computed_and_resumed(made_recipe(backbone={"weights": "shipped:resnet-tiny-printed"}, stages=stages_of("layer3")), folder / "b")
print("equal runs", torch.get_num_threads(), (folder / "computed" / "plan.txt").read_text())
"""


def with_threads(program: str, num: int, folder: Path) -> str:
    """What a program prints in a process with this number of threads."""
    command = [sys.executable, "-c", PREPARE + program, str(TESTS), str(num), str(folder)]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}  # waiting threads would spin, and tests share the cores
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=TESTS.parent, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("threads", [2, slow(3)])
def test_features_do_not_depend_on_the_place_in_a_batch(threads: int, tmp_path: Path) -> None:
    """Attention over 17 tokens gives other bits in each thread's part of torch's buffer, so those networks run image by image."""
    lines = with_threads(TURNED, threads, tmp_path).splitlines()[-3:]
    assert [line.split()[:2] for line in lines] == [["dinov2", "same"], ["cvt", "same"], ["convnext", "same"]]
    assert lines[2].endswith("in chunks")


@pytest.mark.slow
@pytest.mark.parametrize("threads", [2, 3])
def test_a_run_is_the_same_stored_and_computed_with_threads(threads: int, tmp_path: Path) -> None:
    assert f"equal runs {threads}" in with_threads(TRAINED, threads, tmp_path)
