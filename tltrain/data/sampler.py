"""Who is trained on when: pure functions of seeds and positions.

Raw bits of PCG64 and a stable sort, so that no version of numpy changes an order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv

Box = tuple[int, int, int, int]


class SampleRef(NamedTuple):
    """One sample as the loader is asked for it."""

    index: int  # type: ignore[assignment] # hides tuple.index, which nobody needs of a sample
    """Position in the split."""
    view: int
    weight: float = 1.0
    """0 for a sample that only fills a batch."""
    partner: int = -1
    """Position in the split of the image it is mixed with; -1: none."""
    partner_view: int = 0
    lam: float = 1.0
    """Share of the sample itself; the partner has the rest."""
    box: Box | None = None
    """cutmix: top, left, bottom, right (half open) of the partner's pixels; None for mixup."""


def key(*parts: int | str) -> int:
    """A 63-bit seed from integers and names."""
    text = ",".join(repr(p) if isinstance(p, str) else str(int(p)) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def raw_bits(seed: int, n: int) -> np.ndarray:
    """(n,) uint64."""
    return np.random.PCG64(seed).random_raw(n)


def uniform(seed: int, n: int) -> np.ndarray:
    """(n,) float64 in [0, 1)."""
    return (raw_bits(seed, n) >> np.uint64(11)) * 2.0**-53


def shuffled(seed: int, n: int) -> np.ndarray:
    """A permutation (n,) int64 of 0 to n - 1."""
    return np.argsort(raw_bits(seed, n), kind="stable")


@dataclass(frozen=True)
class SampleStream:
    """The samples of one stage: permutation 0, permutation 1, and so on; step s takes positions [sB, (s + 1)B). There is no tail."""

    seed: int
    stage: int
    num_samples: int
    batch: int
    """B, samples per step over all processes."""
    views: int | None
    """None: a fresh view each epoch; k: the views 0 to k - 1 in turn."""
    first_epoch: int
    """Planned epoch of the whole run at which this stage begins: fresh views go on where the stage before ended."""
    draw_weights: tuple[float, ...] | None = None
    """(num_samples,): each epoch is num_samples draws with replacement in these proportions, not a permutation."""
    mixup: float = 0.0
    """Alpha of Beta(alpha, alpha); 0 is off."""
    cutmix: float = 0.0
    size: int = 0
    """Side of the image in pixels, for cutmix's boxes."""

    def step(self, s: int) -> list[SampleRef]:
        """The global batch of step s, B items."""
        index_B, view_B = self.positions(s)
        samples = list(zip(index_B.tolist(), view_B.tolist(), strict=True))
        if self.mixup == 0 and self.cutmix == 0:
            return [SampleRef(index, view) for index, view in samples]
        return self._mixed(s, samples)

    def positions(self, s: int) -> tuple[np.ndarray, np.ndarray]:
        """Index and view (B,) int64 of the global batch of step s, unmixed: a head that is fed from a store has little else to do."""
        start, stop = s * self.batch, (s + 1) * self.batch
        parts = []
        for epoch in range(start // self.num_samples, -(-stop // self.num_samples)):
            offset = epoch * self.num_samples
            part = slice(max(start - offset, 0), stop - offset)
            parts.append([array_N[part] for array_N in self._epoch(epoch)])
        index_B, view_B = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return index_B, view_B

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Index and view of each sample of an epoch, (num_samples,) int64 each; the last two epochs are kept."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = self._draw(epoch)
        return self._epochs[epoch]

    @cached_property
    def _epochs(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        seed = key(self.seed, "order", self.stage, epoch)
        if self._cumulative is None:
            return shuffled(seed, self.num_samples), np.full(self.num_samples, self._view(epoch))
        index_N = np.searchsorted(self._cumulative, uniform(seed, self.num_samples) * self._cumulative[-1], side="right")
        again_N = _times_before(index_N)  # so that an image drawn ten times in an epoch shows ten views, not one with weight ten
        if self.views is not None:
            return index_N, (epoch + again_N) % self.views
        return index_N, self._view(epoch) + (again_N << 32)

    def _view(self, epoch: int) -> int:
        return 1 + self.first_epoch + epoch if self.views is None else epoch % self.views

    @cached_property
    def _cumulative(self) -> np.ndarray | None:
        return None if self.draw_weights is None else np.cumsum(self.draw_weights)

    def _mixed(self, s: int, samples: list[tuple[int, int]]) -> list[SampleRef]:
        """Each sample's partner stands a number of places further on in the same batch; the number is drawn for the step."""
        n = len(samples)
        choice, shift = uniform(key(self.seed, "mix", self.stage, s), 2)
        cut = self.mixup == 0 or (self.cutmix > 0 and choice < 0.5)
        places = 1 + int(shift * (n - 1)) if n > 1 else 0
        u_B3 = uniform(key(self.seed, "lam", self.stage, s), 3 * n).reshape(n, 3)
        alpha = self.cutmix if cut else self.mixup
        lam_B = betaincinv(alpha, alpha, u_B3[:, 0])
        items = []
        for p, (index, view) in enumerate(samples):
            lam, box = float(lam_B[p]), None
            if cut:
                box, lam = _box(lam, u_B3[p, 1], u_B3[p, 2], self.size)
            partner, partner_view = samples[(p + places) % n]
            items.append(SampleRef(index, view, 1.0, partner, partner_view, lam, box))
        return items


def rank_slice(batch: int, rank: int, world: int) -> slice:
    """The part of the global batch that a rank takes; the sizes differ by at most 1."""
    return slice(batch * rank // world, batch * (rank + 1) // world)


def num_micro(batch: int, world: int, max_device_batch: int) -> int:
    """Micro-batches per step, the same on all ranks, so that none is larger than max_device_batch."""
    return math.ceil(math.ceil(batch / world) / max_device_batch)


def micro_batches(items: Sequence[SampleRef], num: int) -> list[list[SampleRef]]:
    """The items in `num` parts whose sizes differ by at most 1; in place of an empty part, the first item with weight 0."""
    parts = [list(items[rank_slice(len(items), i, num)]) for i in range(num)]
    return [part or [items[0]._replace(weight=0.0)] for part in parts]


def _times_before(index_N: np.ndarray) -> np.ndarray:
    """(N,) how often each value stands before its place."""
    order = np.argsort(index_N, kind="stable")
    sorted_N = index_N[order]
    before_N = np.empty(len(index_N), dtype=np.int64)
    before_N[order] = np.arange(len(index_N)) - np.searchsorted(sorted_N, sorted_N, side="left")
    return before_N


def _box(lam: float, u_y: float, u_x: float, size: int) -> tuple[Box, float]:
    """cutmix's box (Yun et al. 2019: side size * sqrt(1 - lam), centre anywhere, clipped) and the exact share of the area outside it."""
    side = int(size * math.sqrt(1 - lam))
    y, x = int(u_y * size), int(u_x * size)
    top, left, bottom, right = (min(max(v, 0), size) for v in (y - side // 2, x - side // 2, y - side // 2 + side, x - side // 2 + side))
    if bottom <= top or right <= left:
        return (0, 0, 0, 0), 1.0
    return (top, left, bottom, right), 1 - (bottom - top) * (right - left) / size**2
