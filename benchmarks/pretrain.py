"""Makes the weights that come with tltrain again: both small nets on printed characters, about five minutes on one core."""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import load_file

import tltrain
from tltrain.core import recipe
from tltrain.core.flags import RunFlags
from tltrain.models.factory import read_card, write_weights
from tltrain.training.run import train

SHIPPED = Path(tltrain.__file__).parent / "models" / "shipped"
RECIPES = {"printed-resnet": "resnet-tiny-printed", "printed-vit": "vit-tiny-printed"}
MAX_BYTES = 2_000_000


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pretrain", description=__doc__)
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the run folders (default: runs)")
    parser.add_argument("--out", type=Path, default=SHIPPED, help="folder of the weights (default: the package's own)")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, shipped in RECIPES.items():
        print(pretrain(name, arguments.runs / name, arguments.out / f"{shipped}.safetensors"))


def pretrain(name: str, run: Path, out: Path) -> str:
    """Train a shipped recipe in the folder `run`, or go on, and copy its weights to `out`. Returns a line about them."""
    outcome = train(recipe.load(name), RunFlags(folder=run))["outcome"]
    if outcome != "finished":
        raise SystemExit(f"{name} {outcome}; the same command goes on")
    weights = run / "weights.safetensors"
    card = read_card(weights)
    assert card is not None, "a run writes its card"
    write_weights(out, load_file(weights), card)
    num_bytes = out.stat().st_size
    if num_bytes > MAX_BYTES:
        raise SystemExit(f"{out} has {num_bytes:,} bytes; shipped weights have at most {MAX_BYTES:,}: take a smaller net")
    return f"{out}: {card.name}, {len(card.classes or ())} classes, {num_bytes:,} bytes"


if __name__ == "__main__":
    main()
