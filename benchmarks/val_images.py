"""Whether a solved head should learn from val too: test top-1, log loss and calibration with and without it. Over many splits of one set.

    python -m benchmarks.val_images folder-small --data.source folder:pictures --backbone.weights efficientnet-lite0-57934424.pth

A head that leaves val out has its temperature fitted there, as a run has. One that learns from val has none: a solved head scales its
probabilities by images that it leaves out.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.demo_gain import bootstrap, cpu_name
from tltrain.analysis.features import EVERY, FeatureBank
from tltrain.commands import demo
from tltrain.core.arguments import parsing
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.output.console import Console
from tltrain.data.sampler import derive_seed
from tltrain.data.splits import cut, keep_per_class
from tltrain.evaluation.calibration import fit_temperature
from tltrain.evaluation.metrics import NUM_BINS
from tltrain.heads.solve import Kind, solve

VAL, TEST = 0.1, 0.2


def main(words: Sequence[str] | None = None) -> list[str]:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.val_images", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a shipped name or a .yaml file")
    parser.add_argument("--splits", type=int, default=30, help="data seeds 0 to N-1, each with a split of its own (default: 30)")
    parser.add_argument("--of-each", type=int, nargs="+", default=[3, 5, 10, 20, 0], help="images of a class beside test; 0: all")
    parser.add_argument("--head", choices=("ridge", "logistic"), default="ridge")
    given, overrides = parser.parse_known_args(words)
    if given.splits < 2:
        parser.error(f"--splits is {given.splits}; a spread needs at least 2")
    try:
        recipe, _ = parsing.parse("train", [given.recipe, *overrides])
        whole = recipe.override({"data": {"val_fraction": 0, "test_fraction": 0, "per_class": None}})
        with FeatureBank.open(whole, RunFlags(folder=Path("runs/val-images")), Console(False), which=EVERY) as bank:
            features_ND, label_N, group_N = bank.features(), bank.labels, bank.groups
    except UserError as error:
        parser.error(str(error))
    lines = [
        "| images of a class | train | val | top-1 without val | with it gains | log loss | calibration error, % |",
        "|--|--:|--:|--:|--:|--:|--:|",
    ]
    with demo.one_thread():
        for each in given.of_each:
            lines.append(row(given.head, features_ND, label_N, group_N, each, given.splits))
    print("\n".join(lines))
    print(f"\n{given.head}, {given.splits} splits; {cpu_name()}, one thread of {os.cpu_count()} cores, torch {torch.__version__}")
    return lines


def row(kind: Kind, features_ND: Tensor, label_N: np.ndarray, group_N: np.ndarray, of_each: int, num_splits: int) -> str:
    """A line of the table. of_each: images of a class that train and val have together at most. 0: all."""
    pairs = [one_split(kind, features_ND, label_N, group_N, of_each, seed) for seed in range(num_splits)]
    found_S23 = np.array([pair[:2] for pair in pairs])
    num_train, num_val = pairs[0][2]
    gain_S3 = found_S23[:, 1] - found_S23[:, 0]
    cells = []
    for k, form in enumerate(("{:+.1f}", "{:+.2f}", "{:+.1f}")):
        _, low, high = bootstrap(gain_S3[:, k].tolist())
        cells.append(f"{form.format(gain_S3[:, k].mean())} ({form.format(low)} to {form.format(high)})")
    return f"| {of_each or 'all'} | {num_train} | {num_val} | {found_S23[:, 0, 0].mean():.1f} | {' | '.join(cells)} |"


def one_split(
    kind: Kind, features_ND: Tensor, label_N: np.ndarray, group_N: np.ndarray, of_each: int, seed: int
) -> tuple[tuple[float, ...], tuple[float, ...], tuple[int, int]]:
    """(top-1 in percent, log loss, calibration error in percent) without val, the same with it, and (images of train, of val)."""
    num_classes = int(label_N.max()) + 1
    test_N = cut(label_N, group_N, TEST, derive_seed(seed, "test"))
    both = np.flatnonzero(~test_N)
    if of_each:
        both = both[keep_per_class(label_N[both], of_each, derive_seed(seed, "per_class"))]
    leaves = cut(label_N[both], group_N[both], VAL, derive_seed(seed, "val"))
    train, val = both[~leaves], both[leaves]
    alone, together = (solve(kind, features_ND[at], label_N[at], num_classes) for at in (train, both))
    temperature = fit_temperature(alone.logits(features_ND[val]).numpy(), label_N[val])
    logits = (alone.logits(features_ND[test_N]) / temperature, together.logits(features_ND[test_N]))
    first, second = (_figures(each, label_N[test_N]) for each in logits)
    return first, second, (len(train), len(val))


def _figures(logits_NK: Tensor, label_N: np.ndarray) -> tuple[float, float, float]:
    log_p_NK = logits_NK.log_softmax(1)
    right_N, confidence_N = log_p_NK.argmax(1).numpy() == label_N, log_p_NK.max(1).values.exp().numpy()
    loss = -float(log_p_NK.gather(1, torch.from_numpy(label_N)[:, None]).mean())
    bin_N = np.ceil(confidence_N * NUM_BINS)
    apart = sum(abs(float((confidence_N - right_N)[bin_N == b].sum())) for b in np.unique(bin_N)) / len(label_N)
    return 100 * float(right_N.mean()), loss, 100 * apart


if __name__ == "__main__":
    main()
