"""The head of a stage that is solved: which layer it is, the features that it is worked out from, and its weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tltrain.cache.feature_table import Rows
from tltrain.cache.frozen import FrozenModel
from tltrain.cache.planner import CHUNK
from tltrain.core.errors import UserError
from tltrain.core.output.console import clock, duration
from tltrain.core.stage_plan import StagePlan
from tltrain.data import DataSplits, class_weights
from tltrain.data.loader import item_loader, on_device
from tltrain.data.sampler import SampleRef, Shard
from tltrain.data.views import Views
from tltrain.distributed.consensus import FlagAllReduce
from tltrain.distributed.runtime import Runtime
from tltrain.evaluation.evaluator import Interrupted
from tltrain.heads.solve import SolvedHead, solve
from tltrain.models.chain import Chain

OPERATIONS_S = 5e9
"""Operations a second of one thread in double precision, for the plan's estimate."""
ANSWER_S = 0.5
"""Seconds between two looks at whether a stop is requested while process 0 works alone."""
READ = 4096
"""Stored rows that are read at a time."""


def check(chain: Chain, plan: Sequence[StagePlan]) -> None:
    """Raise UserError for a stage with solve where the network's head is no single linear layer."""
    for stage in plan:
        if stage.spec.solve is not None:
            head_of(chain, stage)


def head_of(chain: Chain, stage: StagePlan) -> tuple[str, nn.Linear]:
    """`linear_head` of a stage that is solved."""
    told = f"stage {stage.spec.name} has solve: {stage.spec.solve}"
    return linear_head(chain, told, "train this stage instead: leave solve out, and give it lr and steps")


def linear_head(chain: Chain, told: str, remedy: str, places: tuple[int, ...] = ()) -> tuple[str, nn.Linear]:
    """(path in the net, layer) of the head: a single linear layer with a bias, which takes the features and gives the logits.

    told, remedy: begin and end of the UserError that is raised where there is none. places: of the features of an image that the head is
    to take one by one, beside those that it takes as they come.
    """
    last = len(chain.blocks) - 1
    if chain.runs_whole:
        raise UserError(f"{told}, which needs the features before the head, and blocks of this network cannot run one by one; {remedy}")
    own = {id(parameter) for _, parameter in chain.parameters_of(last)}
    linear = [(name, m) for name, m in chain.modules_of(last) if isinstance(m, nn.Linear) and {id(p) for p in m.parameters()} == own]
    if len(linear) != 1 or linear[0][1].bias is None or not all(_is_all(chain, linear[0][1], at) for at in {(), places}):
        kinds = ", ".join(dict.fromkeys(type(m).__name__ for _, m in chain.modules_of(last) if any(True for _ in m.parameters(False))))
        raise UserError(f"{told}, and the head of this network is no single linear layer with a bias ({kinds or 'parameters'}); {remedy}")
    return linear[0]


def _is_all(chain: Chain, layer: nn.Linear, places: tuple[int, ...]) -> bool:
    """Whether the head block takes a vector at each place, hands it to the layer as it is, and gives what the layer gives."""
    step, weight = chain.blocks[-1].step, layer.weight
    assert step is not None
    features, answer = (
        torch.linspace(low, 1, 2 * math.prod(places) * num, device=weight.device, dtype=weight.dtype).view(2, *places, num)
        for low, num in ((-1, layer.in_features), (0, layer.out_features))
    )
    taken: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, given, __: taken.append(given[0]) or answer)  # type: ignore[func-returns-value]
    training = chain.training
    try:
        with torch.no_grad():
            out = step(chain.eval().net, features)
    except (RuntimeError, ValueError, IndexError, TypeError):  # it takes something else than vectors
        return False
    finally:
        hook.remove()
        chain.train(training)
    pairs = [(taken[0], features), (out, answer)] if len(taken) == 1 and isinstance(out, Tensor) else []
    return bool(pairs) and all(a.shape == b.shape and (a.is_meta or torch.equal(a, b)) for a, b in pairs)


def plan_line(chain: Chain, stage: StagePlan) -> str:
    """The line of the plan about a stage with solve."""
    layer, rows = head_of(chain, stage)[1], stage.num_reads
    columns, num_classes, views = layer.in_features, layer.out_features, stage.spec.views or 1
    of = f"{views} views of {stage.num_samples:,} images" if views > 1 else f"{rows:,} images"
    seconds = _operations(rows, columns, num_classes, stage.spec.solve == "logistic") / OPERATIONS_S
    told = f"{stage.spec.name}: {stage.spec.solve} on {rows:,} features of {columns:,} numbers"
    return f"{told} ({of}, each read once), then {_about(seconds)}"


def _about(seconds: float) -> str:
    return f"about {duration(seconds)}" if seconds >= 1 else "less than a second"


def _operations(rows: int, columns: int, num_classes: int, logistic: bool) -> float:
    """Floating-point operations of the covariance, its decomposition, and what is done for each strength."""
    side = min(rows, columns)
    basis = 4 * rows * columns * side + 10 * side**3
    return basis + (4 * 600 if logistic else 2 * 22) * rows * side * num_classes


@dataclass(frozen=True)
class HeadProblem:
    """The inputs from which a stage's head is solved."""

    runtime: Runtime
    stage: StagePlan
    images: DataSplits
    balanced: bool
    """Whether classes count alike: data.balance weights, or in expectation sampler."""
    path: str
    """Of the linear layer in the net."""
    seed: int

    def __call__(self, features_ND: Tensor | None, should_stop: Callable[[], bool]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The weights by their names in the net, and values of a row in the log, the same on every process. Collective.

        features_ND: on process 0, which works alone, of every view of every training image, view by view. The others answer it now and
        then, so that all hear a stop and no one waits longer than the time-out. Raises Interrupted, and UserError on every process.
        """
        began, done = clock(), FlagAllReduce(self.runtime, 1)
        found: SolvedHead | UserError | None = None
        last = [began]

        def alive() -> None:
            if clock() - last[0] > ANSWER_S:
                last[0] = clock()
                done.sum_now([0])
                if should_stop():
                    raise Interrupted

        if features_ND is not None:
            try:
                found = self._solved(features_ND, alive)
            except UserError as error:
                found = error
            done.sum_now([1])
        else:
            while not done.sum_now([0])[0]:
                if should_stop():
                    raise Interrupted
        found = self.runtime.share(found)
        if isinstance(found, UserError):
            raise found
        assert isinstance(found, SolvedHead)
        weights = {f"{self.path}.weight": found.weight_KD.float(), f"{self.path}.bias": found.bias_K.float()}
        row = {"solve": self.stage.spec.solve, "strength": found.strength, "notes": list(found.notes), "features": self.stage.num_reads}
        return weights, {**row, "seconds": clock() - began}

    def _solved(self, features_ND: Tensor, alive: Callable[[], None]) -> SolvedHead:
        kind, train, num_classes = self.stage.spec.solve, self.images.train, len(self.images.classes)
        assert kind is not None
        times = self.stage.spec.views or 1
        weight_N = class_weights(train.labels, num_classes)[train.labels] if self.balanced else np.ones(len(train))
        label_M, weight_M, group_M = (np.concatenate([array] * times) for array in (train.labels, weight_N, groups(self.images)))
        return solve(kind, features_ND.flatten(1), label_M, num_classes, weight_N=weight_M, group_N=group_M, seed=self.seed, alive=alive)


def groups(images: DataSplits) -> np.ndarray:
    """(N,) int64, the group of each training image. Each is one of its own where the source is not known."""
    if images.source is None:
        return images.train.source_index
    place = {number: i for i, number in enumerate(images.source.numbers.tolist())}
    group_N: np.ndarray = images.source.groups[[place[number] for number in images.train.source_index.tolist()]]
    return group_N


def stored_features(runtime: Runtime, rows: Rows, stage: StagePlan, should_stop: Callable[[], bool]) -> Tensor | None:
    """Features of every view of every training image out of a store (N x views, ...), on process 0 alone. Collective.

    Raises Interrupted."""
    if should_stop():
        raise Interrupted
    if not runtime.is_main:
        return None
    position_M = torch.arange(stage.num_samples).repeat(stage.spec.views or 1)
    view_M = torch.arange(stage.spec.views or 1).repeat_interleave(stage.num_samples)
    return torch.cat([rows(p, v).cpu() for p, v in zip(position_M.split(READ), view_M.split(READ), strict=True)])


def computed_features(
    runtime: Runtime, prefix: FrozenModel, views: Views, stage: StagePlan, workers: int, should_stop: Callable[[], bool]
) -> Tensor | None:
    """As `stored_features`, computed by all processes together. The bits are those of a store: the same chunks, the same rounding."""
    shard = Shard(runtime.rank, runtime.world)
    items = [SampleRef(i, view) for view in range(stage.spec.views or 1) for i in range(stage.num_samples)]
    chunk = prefix.chunk or CHUNK["cpu"]
    batches = list(_shares(items, shard, chunk * math.ceil(CHUNK["cpu"] / chunk)))
    parts = []
    for batch in on_device(item_loader(views, batches, workers, runtime.device.type == "cuda"), runtime.device):
        if should_stop():
            raise Interrupted
        gathered = runtime.gather(prefix(batch["image"]))
        if runtime.is_main:  # of each process a part: back into the order of the items
            parts.append(gathered.cpu().unflatten(0, (shard.world, -1)).transpose(0, 1).flatten(0, 1))
    return torch.cat(parts)[: len(items)] if runtime.is_main else None


def _shares(items: list[SampleRef], shard: Shard, size: int) -> Iterator[list[SampleRef]]:
    """The batches of this process, as many and as large as those of the others: every `world`-th item, padded by the first."""
    per_rank = math.ceil(len(items) / shard.world)
    padded = items + [items[0]] * (per_rank * shard.world - len(items))
    own = padded[shard.rank :: shard.world]
    return (own[at : at + size] for at in range(0, per_rank, size))
