"""tltrain as a contestant, and its honest opponent: the same training as a bare loop, tuned as one would by hand."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from tltrain.core import stage_plan
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.core.stage_plan import StagePlan
from tltrain.data import open_images
from tltrain.data.sampler import SampleStream
from tltrain.data.views import Views
from tltrain.models import factory
from tltrain.models.chain import Chain
from tltrain.runs.metrics_log import read_rows
from tltrain.training import optim, run
from tltrain.training import stage as staging
from tltrain.training.weights.trained import freeze

Use = Literal["auto", "always", "never"]
WARM_STEPS = 0.1
"""Part of the steps of a loop that passes before its clock starts."""


@dataclass(frozen=True)
class Trained:
    """What one run of ours took."""

    stage_s: float
    """From plain weights to plain weights: building the stage, filling its store, training."""
    whole_s: float
    """The whole of `tltrain train` without its imports."""
    rows: list[dict[str, Any]]
    """Its training rows, and the test row where there is one."""

    @property
    def loss(self) -> float:
        """The last training row's: the mean since the row before."""
        return float(self.train[-1]["loss"])

    @property
    def train(self) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["kind"] == "train"]

    def loop_s(self, stage: StagePlan) -> float:
        """Seconds between the rows that `measured` names."""
        first, last = measured(stage)
        at = {row["step"]: row["time"] for row in self.train}
        return float(at[last] - at[first])


def ours(recipe: Recipe, store: Use, cache: Path | None, folder: Path | None = None, images: Use = "auto") -> Trained:
    """Train in this process, without a word on the terminal.

    store, images: the start-up flags of the store of features and logits, and of that of decoded images. cache: where both lie; None for
    fresh ones, which are cold. folder: the run folder; None for one that is thrown away.
    """
    with contextlib.ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tltrain-timing-")))
        path = folder or temporary / "run"
        stack.enter_context(mock.patch.dict(os.environ, TLTRAIN_CACHE=str(cache or temporary / "cache")))
        seconds = stack.enter_context(_stage_clock())
        said = stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        began = time.perf_counter()
        outcome = run.train(recipe, RunFlags(folder=path, workers=0, cache=store, cache_images=images))["outcome"]
        whole_s = time.perf_counter() - began
        if outcome != "finished":
            raise RuntimeError(f"{recipe.name} {outcome}: {said.getvalue()}")
        return Trained(sum(seconds), whole_s, [row for row in read_rows(path) if row["kind"] in ("train", "test")])


@contextlib.contextmanager
def _stage_clock() -> Iterator[list[float]]:
    """Seconds of each stage that runs inside the block."""
    seconds: list[float] = []

    def timed(*arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        try:
            return staging.run_stage(*arguments, **named)
        finally:
            seconds.append(time.perf_counter() - began)

    with mock.patch.object(run, "run_stage", timed):
        yield seconds


@dataclass(frozen=True)
class Setting:
    """A recipe of one stage as a bare loop needs it: everything in memory, in the order in which tltrain trains on it."""

    recipe: Recipe
    chain: Chain
    """With the weights that the stage starts from."""
    stage: StagePlan
    images_NCHW: Tensor
    """uint8, view 0 of every training image."""
    labels_N: Tensor
    order_SB: Tensor
    """Positions of each step's images."""


def setting(recipe: Recipe) -> Setting:
    """Raises UserError as the run itself would. The recipe's stage sees view 0 alone."""
    images = open_images(recipe.data)
    data = recipe.data
    loaded = factory.load(recipe.backbone, classes=images.classes, size=data.size, resize=data.resize, head="new", seed=recipe.seed)
    stage = stage_plan.plan(recipe, loaded.chain, len(images.train), images.val is not None)[0]
    assert stage.spec.views == 1, "what a bare loop has in memory is view 0"
    views = Views(images.train, loaded.preprocess, "none", data.flip, data.seed)
    images_NCHW = torch.stack([views.view(i, 0) for i in range(len(images.train))])
    stream = SampleStream(recipe.seed, stage.index, len(images.train), recipe.batch, stage.spec.views, stage.first_epoch)
    order_SB = torch.tensor([[item.position for item in stream.step(s)] for s in range(stage.num_steps)])
    return Setting(recipe, loaded.chain, stage, images_NCHW, torch.from_numpy(images.train.labels), order_SB)


def measured(stage: StagePlan) -> tuple[int, int]:
    """(first, last) step between which a loop's time is taken: both have a row, and what start-up costs is over."""
    rows = -(-stage.num_steps // stage.log_steps)
    return max(1, round(WARM_STEPS * rows)) * stage.log_steps, stage.num_steps


@dataclass(frozen=True)
class Loop:
    """What a bare loop took."""

    whole_s: float
    loop_s: float
    """Seconds between the steps that `measured` names."""
    loss: float
    """The mean over the steps of tltrain's last row."""


def bare_loop(of: Setting, forward: Callable[[Chain, Tensor], Tensor]) -> Loop:
    """Train the stage's blocks with fused AdamW. forward: (chain, positions (B,)) to logits (B, K).

    Nothing is logged, checked or saved, and no loss is read before the end.
    """
    # Accelerate's run before this one may have asked for slower kernels; nobody asks for them here.
    torch.use_deterministic_algorithms(False)
    chain, stage = copy.deepcopy(of.chain).to(memory_format=of.chain.layout), of.stage
    freeze(chain, stage)
    chain.train()
    first, last = measured(stage)
    marks, losses = {}, []
    began = time.perf_counter()
    optimizer = torch.optim.AdamW(optim.parameter_groups(chain, stage), lr=stage.lr, fused=True)
    for step, index_B in enumerate(of.order_SB):
        optim.set_lr(optimizer, stage.lr_factor(step))
        loss = F.cross_entropy(forward(chain, index_B), of.labels_N[index_B])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if step + 1 in (first, last):
            marks[step + 1] = time.perf_counter()
    whole_s = time.perf_counter() - began
    num_last = (stage.num_steps - 1) % stage.log_steps + 1
    return Loop(whole_s, marks[last] - marks[first], torch.stack(losses[-num_last:]).double().mean().item())


def over_frozen(of: Setting) -> Callable[[Chain, Tensor], Tensor]:
    """The forward of a loop that runs the frozen blocks in each step: in eval mode, without gradients."""
    first = of.stage.first_trainable_block

    def forward(chain: Chain, index_B: Tensor) -> Tensor:
        with torch.no_grad():
            features = chain(of.images_NCHW[index_B], stop=first)
        return chain(features, start=first)

    return forward


def over_features(of: Setting, features_N: Tensor) -> Callable[[Chain, Tensor], Tensor]:
    """The forward of a loop that is fed what the frozen blocks make, from a tensor in memory."""
    return lambda chain, index_B: chain(features_N[index_B], start=of.stage.first_trainable_block)


def features(of: Setting, chunk: int = 32) -> Tensor:
    """(N, ...) fp32, what the frozen blocks make of every image."""
    chain = of.chain.eval()
    with torch.no_grad():
        return torch.cat([chain(part, stop=of.stage.first_trainable_block) for part in of.images_NCHW.split(chunk)])


def flops(of: Setting) -> tuple[int, int]:
    """Floating point operations an image: (the frozen blocks forward, the training blocks forward and backward)."""
    chain = copy.deepcopy(of.chain)
    freeze(chain, of.stage)
    chain.train()
    with FlopCounterMode(display=False) as frozen, torch.no_grad():
        x = chain(of.images_NCHW[:1], stop=of.stage.first_trainable_block)
    with FlopCounterMode(display=False) as trained:
        chain(x, start=of.stage.first_trainable_block).sum().backward()
    return frozen.get_total_flops(), trained.get_total_flops()
