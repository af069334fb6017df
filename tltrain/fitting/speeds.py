"""How fast a network runs on this machine, and where its training could begin."""

from __future__ import annotations

from dataclasses import dataclass

from tltrain.analysis.features import FeatureBank
from tltrain.cache.measure import least_s, time_frozen
from tltrain.data.views import Views
from tltrain.models.families.common import is_convolutional
from tltrain.planning.compiling import TRAINING

SHARES = (0.15, 0.4)
"""Shares of a network's time that its training part may take, from the shallowest cut on. The whole network is tried too."""


@dataclass(frozen=True)
class Cut:
    """A block from which a stage could train."""

    unfreeze: str
    frozen_s: float
    """Seconds of the blocks before it, for one image."""
    row_bytes: int
    """Bytes of a stored row."""


@dataclass(frozen=True)
class Speeds:
    """Seconds of one image on this machine, as measured."""

    device: str
    workers: int
    image_s: float
    """To read, resize and augment it, by one data worker."""
    whole_s: float
    """The whole network's forward pass."""
    cuts: tuple[Cut, ...]
    """From the shallowest to the deepest."""
    transformer: bool
    """Whether it is no network of convolutions, and wants a smaller learning rate."""

    def step_s(self, cut: Cut, batch: int) -> float:
        """A training step from stored rows."""
        return TRAINING * batch * max(self.whole_s - cut.frozen_s, 1e-4 * self.whole_s)

    def fill_s(self, cut: Cut, num_rows: int) -> float:
        """To compute and store rows."""
        return num_rows * (cut.frozen_s + self.image_s / max(1, self.workers))


def speeds_of(bank: FeatureBank, workers: int) -> Speeds:
    """Measure a network that is open on its device."""
    chain, side, device = bank.loaded.chain, bank.loaded.preprocess.size, bank.runtime.device
    names = [block.name for block in chain.blocks]
    last = len(names) - 1
    whole_s, _ = time_frozen(bank.frozen(last), side, device)
    split, data = bank.splits[0], bank.recipe.data
    views = Views(split, bank.loaded.preprocess, "light", data.flip, data.seed)
    places = [i * len(split) // 4 for i in range(4)]
    image_s = least_s(lambda: [views.view(i, 1) for i in places], times=2) / 4
    cuts: list[Cut] = []
    if not chain.runs_whole:
        starts = _starts(names)
        timed = {i: time_frozen(bank.frozen(i), side, device) for i in starts}
        for share in SHARES:
            near = min(starts, key=lambda i: abs(1 - timed[i][0] / whole_s - share), default=None)
            if near is not None and all(names[near] != cut.unfreeze for cut in cuts):
                cuts.append(Cut(names[near], *timed[near]))
        cuts.sort(key=lambda cut: -cut.frozen_s)
    cuts.append(Cut("all", 0.0, 0))
    return Speeds(device.type, workers, image_s, whole_s, tuple(cuts), not is_convolutional(chain.net))


def _starts(names: list[str]) -> list[int]:
    """The blocks that a group begins with, such as layer4.0, at most a dozen; every block where there are no groups."""
    inner = list(range(1, len(names) - 1))
    firsts = [i for i in inner if names[i].endswith(".0")]
    starts = firsts if len(firsts) > len(SHARES) else inner
    step = -(-len(starts) // 12) if starts else 1
    return starts[::-1][::step][::-1]
