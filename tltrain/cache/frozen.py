"""Forward passes of frozen networks whose outputs can be cached: the frozen blocks of a stage, and the teacher."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from tltrain.data.views import Batch
from tltrain.distributed.out_of_memory import ChunkTooLarge, is_out_of_memory
from tltrain.models.chain import Chain
from tltrain.models.precision import full_precision

Autocast = Callable[[], AbstractContextManager[None]]

FEATURES, TEACHER = "features", "teacher"
"""Keys of a batch for outputs of frozen blocks and of a teacher, beside the images or in place of them."""


@dataclass(frozen=True)
class TopK:
    """A teacher's answer in short: the logits of its likeliest classes, and one logit that stands for all others.

    Softened by the temperature, that one has the probability of all others together. So both answers, the teacher's and the student's, can
    be compared over the k classes and the rest, and a student that answers as the teacher does is right still.
    """

    num: int
    """k: the classes that are kept, of equal ones the first; fewer than there are."""
    temperature: float

    def pack(self, logits_BK: Tensor) -> Tensor:
        """Logits (B, K), fp16 or fp32 -> integers of as many bits (B, 2k + 1): bits of k logits and of the rest's, then k classes."""
        sorted_BK, class_BK = logits_BK.sort(dim=1, descending=True, stable=True)  # topk may take any of equal logits
        rest_B1 = self._merged(full_precision(sorted_BK[:, self.num :]))
        word = _WORDS[logits_BK.dtype]
        kept = sorted_BK[:, : self.num].view(word), rest_B1.to(logits_BK.dtype).view(word)
        return torch.cat([*kept, class_BK[:, : self.num].to(word)], 1)  # of integers: autocast on a CPU joins no fp16 to fp16

    def merge(self, logits_BK: Tensor, packed_BN: Tensor) -> tuple[Tensor, Tensor]:
        """A student's logits (B, K) over the classes of the packed answers, and those answers: both (B, k + 1), the rest last."""
        dtype = next(dtype for dtype, word in _WORDS.items() if word == packed_BN.dtype)
        class_Bk, logits_BK = packed_BN[:, self.num + 1 :].long(), full_precision(logits_BK)
        rest_B1 = self._merged(logits_BK.scatter(1, class_Bk, -torch.inf))
        return torch.cat([logits_BK.gather(1, class_Bk), rest_B1], 1), packed_BN[:, : self.num + 1].view(dtype)

    def _merged(self, logits_BR: Tensor) -> Tensor:
        """The logit (B, 1) whose exponential at the temperature is the sum of theirs."""
        return self.temperature * (logits_BR / self.temperature).logsumexp(1, keepdim=True)


_WORDS = {torch.float16: torch.int16, torch.float32: torch.int32}
MOST_CLASSES = {torch.float16: 2**15, torch.float32: 2**31}
"""Classes that an integer of as many bits can name."""


@dataclass(frozen=True)
class FrozenModel:
    """A network that does not change during a stage: the first blocks of a student, or a whole teacher.

    Outputs are computed in chunks of one size (the last one padded) and rounded to one dtype. An output therefore does not depend on the
    other images of the batch, and a cached output equals a newly computed one bit for bit. Where an image's place in the chunk matters
    (`place_matters`), a chunk is one image.
    """

    chain: Chain
    stop: int | None
    """The first block that is not run; None runs all blocks."""
    dtype: torch.dtype | None
    """The dtype of outputs; None keeps the network's own."""
    chunk: int | None
    """Images at a time; None runs a batch as it is, for outputs that cannot be cached."""
    autocast: Autocast
    top_k: TopK | None = None
    """What is kept of its rounded logits; None keeps all of the output."""

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), uint8 or floats in [0, 1] -> (B, ...)."""
        with torch.no_grad(), self.autocast():
            if self.chunk is None:
                parts = [self.kept(self.chain.forward(images, stop=self.stop))]
            else:
                parts = [self._padded(part, self.chunk) for part in images.split(self.chunk)]
        return (torch.cat(parts) if len(parts) > 1 else parts[0]).contiguous()  # behind autocast: on a CPU it joins no fp16 to fp16

    def kept(self, out: Tensor) -> Tensor:
        """What is kept of an output of the chain (B, ...): rounded, and packed. Of a chunk as a whole, so that sums do not depend on B."""
        out = out.to(self.dtype)
        return out if self.top_k is None else self.top_k.pack(out)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the blocks' parameters and buffers. Cached, since every cache key of a stage contains it."""
        state = hashlib.blake2b(digest_size=16)
        for i in range(len(self.chain.blocks[: self.stop])):
            buffers = ((f"{name}.{key}", b) for name, module in self.chain.modules_of(i) for key, b in module.named_buffers(recurse=False))
            for name, tensor in (*self.chain.parameters_of(i), *buffers):
                state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return state.hexdigest()

    def _padded(self, part: Tensor, chunk: int) -> Tensor:
        n = len(part)
        try:
            if n < chunk:
                part = torch.cat([part, part.new_zeros((chunk - n, *part.shape[1:]))])
            return self.kept(self.chain.forward(part, stop=self.stop))[:n]  # not __call__, which may be compiled for training
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise ChunkTooLarge(error, chunk) from error
            raise


def without_suffix(chain: Chain, cut: int) -> Chain:
    """A copy of the blocks before `cut`. The other blocks are on the meta device and take no memory."""
    memo: dict[int, Any] = {}  # deepcopy uses these tensors in place of copies
    for i in range(cut, len(chain.blocks)):
        for _, parameter in chain.parameters_of(i):
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for _, module in chain.modules_of(i):
            memo |= {id(buffer): torch.empty_like(buffer, device="meta") for buffer in module.buffers(recurse=False)}
    return copy.deepcopy(chain, memo).eval()


@torch.no_grad()
def place_matters(chain: Chain, size: int, chunk: int, autocast: Autocast) -> bool:
    """Whether an image gives other features in another place of a chunk: each of many stands in two. `chain` is in eval mode.

    MKL's products of small matrices depend on where these begin in memory. So attention over few tokens does: torch gives each thread a
    part of one buffer, wherever the part begins. `MKL_CBWR=AUTO`, set before the program starts, ends that dependence.
    """
    half = torch.randint(0, 256, (chunk // 2, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x = torch.cat([half, half.flip(0)]).to(next(chain.parameters()).device)
    cuts = [0, len(chain.blocks)] if chain.runs_whole else range(len(chain.blocks) + 1)
    with autocast():
        for start, stop in pairwise(cuts):
            x = chain.forward(x, start=start, stop=stop)
            if not torch.equal(x, x.flip(0)):
                return True
    return False


@dataclass(frozen=True)
class InputAdapter:
    """Turns a batch into a model's input: images for the first block, or features for the first block after the frozen ones."""

    prefix: FrozenModel | None = None
    cut: int = 0
    """The first block after the prefix."""

    def __call__(self, batch: Batch) -> tuple[Tensor, int]:
        """(input tensor, index of the block that takes it)."""
        if FEATURES in batch:
            return batch[FEATURES], self.cut
        images = batch["image"]
        return (images, 0) if self.prefix is None else (self.prefix(images), self.cut)


WHOLE = InputAdapter()
"""The whole network runs on images."""
