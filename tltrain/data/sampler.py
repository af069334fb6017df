"""Sample order, views and mixup partners of every training step, as pure functions of seeds and step numbers.

Mixup partners of finite views are of (seed, image, view) alone (`FiniteMixing`); those of fresh views are drawn anew in each step.

Uses raw bits of PCG64 and a stable sort, so that the order does not depend on the version of numpy.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.special import betaincinv

Box = tuple[int, int, int, int]


class SampleRef(NamedTuple):
    """One sample of a batch: which image, which view, its weight and its mixup partner."""

    position: int
    """Position in the split."""
    view: int
    weight: float = 1.0
    """0 for padding."""
    partner: int = -1
    """Position in the split of the image it is mixed with. -1: not mixed."""
    partner_view: int = 0
    lam: float = 1.0
    """Weight of the sample itself. The partner has 1 - lam."""
    box: Box | None = None
    """For cutmix, the box of the partner's pixels: top, left, bottom, right (half open). None for mixup."""


class Shard(NamedTuple):
    """Which part of each global batch this process takes, and in how many micro-batches."""

    rank: int = 0
    world: int = 1
    """Number of processes."""
    num_micro: int = 1
    """Micro-batches of a training step. Evaluation takes whole batches and does not read it."""

    def local(self, batch: int) -> slice:
        """The samples of a global batch that belong to this rank."""
        return rank_slice(batch, self.rank, self.world)


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed from integers and names, by hashing them."""
    text = ",".join(repr(p) if isinstance(p, str) else str(int(p)) for p in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def raw_bits(seed: int, n: int) -> np.ndarray:
    """Random bits, (n,) uint64."""
    return np.random.PCG64(seed).random_raw(n)


def uniform(seed: int, n: int) -> np.ndarray:
    """Uniform random numbers, (n,) float64 in [0, 1)."""
    return (raw_bits(seed, n) >> np.uint64(11)) * 2.0**-53


def counted_uniform(seed: int, first_B: np.ndarray, second_B: np.ndarray, n: int) -> np.ndarray:
    """Uniform random numbers, (B, n) float64 in [0, 1): n for each pair of numbers, whatever the other pairs. Vectorised."""
    step = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key_B = _scrambled(first_B.astype(np.uint64) * step + np.uint64(seed))
        key_B = _scrambled(key_B + (second_B.astype(np.uint64) + np.uint64(1)) * step)
        bits_BN = _scrambled(key_B[:, None] + (np.arange(n, dtype=np.uint64) + np.uint64(1)) * step)
    return (bits_BN >> np.uint64(11)) * 2.0**-53


def _scrambled(z: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser (Steele, Lea and Flood 2014), elementwise."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def shuffled(seed: int, n: int) -> np.ndarray:
    """A random permutation of 0 to n - 1, (n,) int64."""
    return np.argsort(raw_bits(seed, n), kind="stable")


def groups_in_order(group_N: np.ndarray, seed: int) -> Iterator[list[int]]:
    """The positions of each group, in a random order of groups by `seed`."""
    by_group = np.argsort(group_N, kind="stable")
    ends = np.flatnonzero(np.diff(group_N[by_group], append=group_N.max() + 1)) + 1
    order = shuffled(seed, len(ends))
    starts = np.concatenate([[0], ends[:-1]])[order].tolist()  # Python integers: indexing numpy arrays one by one is slow
    positions = by_group.tolist()
    for start, end in zip(starts, ends[order].tolist(), strict=True):
        yield positions[start:end]


def first_of_each(label_N: np.ndarray, order_N: np.ndarray, num_K: Sequence[int]) -> np.ndarray:
    """Mask (N,) of the first num_K[c] samples of each class c in an order of the samples."""
    by_class_N, count_K = order_N[np.argsort(label_N[order_N], kind="stable")], np.bincount(label_N)
    place_N = np.arange(len(label_N)) - np.repeat(np.cumsum(count_K) - count_K, count_K)
    mask_N = np.zeros(len(label_N), dtype=bool)
    mask_N[by_class_N[place_N < np.repeat(num_K, count_K)]] = True
    return mask_N


@dataclass(frozen=True)
class FiniteMixing:
    """Mixup and CutMix of finite views: partner, share and box are pure functions of (seed, number of the image in its source, view).

    So view v of an image is one picture whatever the step, and what a frozen network says of it can be stored. An image's partner is any
    other image of the same split, seen in the view of the same number.
    """

    seed: int
    """data.seed, as for the views themselves."""
    number_N: np.ndarray
    """Number of each sample of the split in its source, (N,)."""
    mixup: float
    """Alpha of mixup's Beta(alpha, alpha). 0: off."""
    cutmix: float
    """As mixup. Where both are on, each view draws one of them."""
    size: int
    """Side of the image in pixels, for cutmix's boxes."""
    weight_N: np.ndarray | None = None
    """(N,) how often each sample is drawn as a partner. None: all alike."""

    def mixed(self, items: Sequence[SampleRef]) -> list[SampleRef]:
        """The samples with their partners. Those that the loader made of padding keep their weight 0."""
        position_B, view_B = (np.array([item[i] for item in items], dtype=np.int64) for i in range(2))
        u_B5 = counted_uniform(derive_seed(self.seed, "mixed view"), self.number_N[position_B], view_B, 5)
        partner_B = self._partners(position_B, u_B5[:, 0])
        cut_B = u_B5[:, 1] < (0.5 if self.mixup and self.cutmix else float(self.mixup == 0))
        alpha_B = np.where(cut_B, self.cutmix, self.mixup)
        lam_B = betaincinv(alpha_B, alpha_B, u_B5[:, 2])
        out = []
        for n, item in enumerate(items):
            lam, box = float(lam_B[n]), None
            if cut_B[n]:
                box, lam = _box(lam, float(u_B5[n, 3]), float(u_B5[n, 4]), self.size)
            out.append(item._replace(partner=int(partner_B[n]), partner_view=item.view, lam=lam, box=box))
        return out

    def _partners(self, position_B: np.ndarray, u_B: np.ndarray) -> np.ndarray:
        """(B,) positions, drawn by weight from all but the sample itself; the sample itself where it is alone."""
        ends_N = self._ends_N
        weight_B = np.ones(len(position_B)) if self.weight_N is None else self.weight_N[position_B]
        drawn_B = u_B * (ends_N[-1] - weight_B)
        drawn_B = drawn_B + weight_B * (drawn_B >= ends_N[position_B] - weight_B)  # skip the sample's own part
        return np.minimum(np.searchsorted(ends_N, drawn_B, side="right"), len(ends_N) - 1)

    @cached_property
    def _ends_N(self) -> np.ndarray:
        return np.cumsum(np.ones(len(self.number_N)) if self.weight_N is None else self.weight_N)


@dataclass(frozen=True)
class SampleStream:
    """The endless sample stream of one stage: one permutation of the split after another.

    Step s takes the elements [sB, (s + 1)B) of the stream. A batch may span two epochs, so no partial batch occurs.
    """

    seed: int
    stage: int
    num_samples: int
    batch: int
    """B, samples per step over all processes."""
    views: int | None
    """None: a fresh view each epoch. k: the views 0 to k - 1 in turn."""
    first_epoch: int
    """Planned epochs of the run before this stage. Fresh views are numbered from here, so that stages share none."""
    draw_weights: tuple[float, ...] | None = None
    """(num_samples,) sampling weights. An epoch is then num_samples draws with replacement in place of a permutation."""
    mixup: float = 0.0
    """Alpha of mixup's Beta(alpha, alpha), drawn anew in each step. 0: off, or `FiniteMixing` mixes."""
    cutmix: float = 0.0
    """Alpha of cutmix's Beta(alpha, alpha), as mixup's."""
    size: int = 0
    """Side of the image in pixels, for cutmix's boxes."""

    def step(self, s: int) -> list[SampleRef]:
        """The global batch of step s, B samples."""
        position_B, view_B = self.positions(s)
        samples = list(zip(position_B.tolist(), view_B.tolist(), strict=True))
        if self.mixup == 0 and self.cutmix == 0:
            return [SampleRef(position, view) for position, view in samples]
        return self._with_partners(s, samples)

    def positions(self, s: int) -> tuple[np.ndarray, np.ndarray]:
        """Position and view, (B,) int64 each, of the global batch of step s, unmixed. Vectorised, for training on cached features."""
        start, stop = s * self.batch, (s + 1) * self.batch
        parts = []
        for epoch in range(start // self.num_samples, -(-stop // self.num_samples)):
            offset = epoch * self.num_samples
            part = slice(max(start - offset, 0), stop - offset)
            parts.append([array_N[part] for array_N in self._epoch(epoch)])
        position_B, view_B = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        return position_B, view_B

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Position and view of each sample of an epoch, (num_samples,) int64 each. Caches the last two epochs."""
        if epoch not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[epoch] = self._draw(epoch)
        return self._epochs[epoch]

    @cached_property
    def _epochs(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        return {}

    def _draw(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        seed = derive_seed(self.seed, "order", self.stage, epoch)
        if self._cumulative is None:
            return shuffled(seed, self.num_samples), np.full(self.num_samples, self._view(epoch))
        position_N = np.searchsorted(self._cumulative, uniform(seed, self.num_samples) * self._cumulative[-1], side="right")
        repeat_N = _times_before(position_N)  # an image drawn ten times in an epoch shows ten different views
        if self.views is not None:
            return position_N, (epoch + repeat_N) % self.views
        return position_N, self._view(epoch) + (repeat_N << 32)

    def _view(self, epoch: int) -> int:
        return 1 + self.first_epoch + epoch if self.views is None else epoch % self.views

    @cached_property
    def _cumulative(self) -> np.ndarray | None:
        return None if self.draw_weights is None else np.cumsum(self.draw_weights)

    def _with_partners(self, s: int, samples: list[tuple[int, int]]) -> list[SampleRef]:
        """Adds mixup or cutmix: each sample's partner is `offset` samples later in the same batch, with one random offset a step."""
        n = len(samples)
        choice, shift = uniform(derive_seed(self.seed, "mix", self.stage, s), 2)
        cut = self.mixup == 0 or (self.cutmix > 0 and choice < 0.5)
        offset = 1 + int(shift * (n - 1)) if n > 1 else 0
        u_B3 = uniform(derive_seed(self.seed, "lam", self.stage, s), 3 * n).reshape(n, 3)
        alpha = self.cutmix if cut else self.mixup
        lam_B = betaincinv(alpha, alpha, u_B3[:, 0])
        items = []
        for p, (position, view) in enumerate(samples):
            lam, box = float(lam_B[p]), None
            if cut:
                box, lam = _box(lam, u_B3[p, 1], u_B3[p, 2], self.size)
            partner, partner_view = samples[(p + offset) % n]
            items.append(SampleRef(position, view, 1.0, partner, partner_view, lam, box))
        return items


def rank_slice(batch: int, rank: int, world: int) -> slice:
    """The part of the global batch that belongs to a rank. Sizes differ by at most 1."""
    return slice(batch * rank // world, batch * (rank + 1) // world)


def num_micro(batch: int, world: int, max_device_batch: int) -> int:
    """Micro-batches per step, equal on all ranks, so that none is larger than max_device_batch."""
    return math.ceil(math.ceil(batch / world) / max_device_batch)


def micro_batches(items: Sequence[SampleRef], num: int) -> list[list[SampleRef]]:
    """The samples in `num` parts whose sizes differ by at most 1. An empty part becomes the first sample with weight 0."""
    parts = [list(items[rank_slice(len(items), i, num)]) for i in range(num)]
    return [part or [items[0]._replace(weight=0.0)] for part in parts]


def _times_before(value_N: np.ndarray) -> np.ndarray:
    """(N,) how often each value occurs earlier in the array."""
    order = np.argsort(value_N, kind="stable")
    sorted_N = value_N[order]
    before_N = np.empty(len(value_N), dtype=np.int64)
    before_N[order] = np.arange(len(value_N)) - np.searchsorted(sorted_N, sorted_N, side="left")
    return before_N


def _box(lam: float, u_y: float, u_x: float, size: int) -> tuple[Box, float]:
    """cutmix's box, and the exact share of the area outside it.

    Yun et al. 2019: side size * sqrt(1 - lam), centre uniform, clipped to the image.
    """
    side = int(size * math.sqrt(1 - lam))
    y, x = int(u_y * size), int(u_x * size)
    top, left, bottom, right = (min(max(v, 0), size) for v in (y - side // 2, x - side // 2, y - side // 2 + side, x - side // 2 + side))
    if bottom <= top or right <= left:
        return (0, 0, 0, 0), 1.0
    return (top, left, bottom, right), 1 - (bottom - top) * (right - left) / size**2
