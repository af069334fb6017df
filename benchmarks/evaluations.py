"""Evaluates splits of 1 to 200 samples in 1 to 4 processes and batches of 1 to 16: each time the figures must be scikit-learn's."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import accuracy_score, log_loss, precision_recall_fscore_support, top_k_accuracy_score
from torch import Tensor, nn
from torch.utils.data import Dataset

from benchmarks import trials, world
from benchmarks.plants import own_rank
from benchmarks.world import Trial
from tltrain.data.loader import eval_loader
from tltrain.data.sampler import SampleRef, Shard
from tltrain.data.views import Preprocess
from tltrain.distributed.runtime import Runtime
from tltrain.evaluation import metrics
from tltrain.evaluation.evaluator import predict

NUM_CLASSES = 7


class Numbered(Dataset[dict[str, Tensor]]):
    """Samples whose image is their own position, with random labels."""

    preprocess = Preprocess(1, 1)
    mixing = None

    def __init__(self, labels_N: np.ndarray) -> None:
        self.labels_N = labels_N

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitems__(self, items: Sequence[SampleRef]) -> dict[str, Tensor]:
        position_B = torch.tensor([item.position for item in items])
        weight_B = torch.tensor([item.weight for item in items])
        return {"image": position_B, "label": torch.from_numpy(self.labels_N)[position_B], "weight": weight_B, "position": position_B}


class Table(nn.Module):
    """A network that knows its answers by heart: logits (N, K) by position."""

    def __init__(self, logits_NK: Tensor) -> None:
        super().__init__()
        self.logits_NK = logits_NK

    def forward(self, position_B: Tensor, start: int) -> Tensor:
        return self.logits_NK[position_B]


def compare(folder: str, max_samples: int, max_batch: int, every: int) -> None:
    """Evaluate splits of 1 to max_samples samples in batches of 1 to max_batch, of these pairs one in `every`, and end this process.

    Writes what was wrong to a file.
    """
    torch.set_num_threads(1)
    runtime, wrong, num = Runtime(deterministic=True), [], 0
    draw = np.random.default_rng(0)
    for n in range(1, max_samples + 1):
        labels_N = draw.integers(0, NUM_CLASSES, n)
        logits_NK = torch.from_numpy(np.round(draw.normal(size=(n, NUM_CLASSES)) * 2, 1)).float()  # rounded: some are tied
        expected = _by_scikit_learn(labels_N, logits_NK.double())
        for batch in (b for b in range(1, max_batch + 1) if (n + b) % every == 0):
            loader: Any = eval_loader(Numbered(labels_N), Shard(runtime.rank, runtime.world), batch, None, 0, False)  # type: ignore[arg-type]
            p, num = predict(runtime, Table(logits_NK), loader), num + 1
            whole = np.array_equal(p.position, np.arange(n)) and np.array_equal(p.label, labels_N)
            if not whole or not np.array_equal(p.predicted, logits_NK.argmax(1).numpy()):
                wrong.append(f"{n} samples in batches of {batch}: samples or predictions")
            figures = metrics.summary(p, NUM_CLASSES) if n % 4 == 0 else {}
            wrong += [
                f"{n} samples in batches of {batch}: {k} {v} is {expected[k]}" for k, v in figures.items() if not _same(k, v, expected)
            ]
    runtime.barrier()
    Path(f"{folder}/compared.rank{own_rank()}").write_text(json.dumps({"evaluations": num, "wrong": wrong}))
    runtime.close()
    os._exit(0)


def _same(name: str, value: float, expected: dict[str, Any]) -> bool:
    """Counts and what follows from them exactly; a sum of logarithms to rounding, since scikit-learn adds in another order."""
    return name not in expected or (abs(value - expected[name]) <= 1e-12 * abs(value) if name == "loss" else value == expected[name])


def _by_scikit_learn(labels_N: np.ndarray, logits_NK: Tensor) -> dict[str, Any]:
    predicted_N, classes = logits_NK.argmax(1).numpy(), list(range(NUM_CLASSES))
    out = {"n": len(labels_N), "top1": accuracy_score(labels_N, predicted_N)}
    out["loss"] = log_loss(labels_N, logits_NK.softmax(1).numpy(), labels=classes)
    for average in ("macro", "weighted"):
        precision, recall, f1, _ = precision_recall_fscore_support(labels_N, predicted_N, average=average, zero_division=0)
        out |= {f"precision_{average}": precision, f"recall_{average}": recall, f"f1_{average}": f1}
    untied = all(len(set(row)) == NUM_CLASSES for row in logits_NK.tolist())  # of tied classes either may be among the five
    return out | ({"top5": top_k_accuracy_score(labels_N, logits_NK.numpy(), k=5, labels=classes)} if untied else {})


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluations", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="one in so many of the pairs of samples and batch (default: 1, all)")
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3, 4], help="numbers of processes (default: 1 2 3 4)")
    arguments = parser.parse_args(words)
    num_bad = 0
    for num in arguments.worlds:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            results = compare_in_world(Path(folder), num, arguments.every)
        wrong = [line for result in results for line in result["wrong"]]
        num_bad += len(wrong)
        print(*wrong, sep="\n", end="\n" if wrong else "")
        print(f"{num} processes: {results[0]['evaluations']} evaluations, {len(wrong)} wrong, {time.monotonic() - began:.0f} s", flush=True)
    raise SystemExit(num_bad > 0)


def compare_in_world(folder: Path, num: int, every: int) -> list[dict[str, Any]]:
    """What each rank of a world found: {"evaluations": number, "wrong": lines}."""
    trial = Trial(trials.recipe(), str(folder / "run"), num, before="evaluations.compare", arguments=(str(folder), 200, 16, every))
    codes = world.run(trial, timeout_s=900)
    assert codes == [0] * num, f"{codes}\n{world.log(trial)}"
    return [json.loads((folder / f"compared.rank{rank}").read_text()) for rank in range(num)]


if __name__ == "__main__":
    main()
