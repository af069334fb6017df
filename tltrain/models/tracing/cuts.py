"""Where a program can be cut: places between instructions where exactly one value lives that depends on the images, a tensor.

Parameters, and tensors made of parameters alone, do not count: the block behind a cut reads or computes them again. Nor do numbers that
follow from shapes, if they can be had from the one tensor that lives, or depend on the size of the images alone.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from tltrain.models.chain import is_batch_norm
from tltrain.models.tracing.program import Instruction, Ref, Segment, at, renumbered, segment

_BATCHES = (2, 3)
"""Two sizes of batches, to tell which numbers depend on it."""
_NUMBERS = {"shape", "size", "dim", "ndim", "device", "dtype", "numel", "__len__"}


@dataclass(frozen=True)
class Dimension:
    """In a recipe for a number: the size of this dimension of the tensor at hand."""

    index: int


class Device:
    """In a recipe for a number: the device of the tensor at hand."""


def number_from(x: Tensor, recipe: Any) -> Any:
    """A number, or a nest of numbers, that follows from the shape of the tensor at hand."""
    if isinstance(recipe, tuple | list):
        return type(recipe)(number_from(x, each) for each in recipe)
    if recipe is Device:
        return x.device
    return x.shape[recipe.index] if isinstance(recipe, Dimension) else recipe


class Cuts:
    """A program and its places to cut. Place p lies between instruction p and p + 1; the instruction with number n is the n-th."""

    def __init__(self, net: nn.Module, instructions: Sequence[Instruction], output: Ref, size: int) -> None:
        """Runs the program on the meta device for images of `size` pixels, and raises whatever the network raises for them."""
        self.instructions, self.output, self.size = tuple(instructions), output, size
        dtype = next(net.parameters()).dtype
        images = [torch.empty((batch, 3, size, size), dtype=dtype, device="meta") for batch in _BATCHES]
        with torch.no_grad():
            runs = [_run(net, self.instructions, each) for each in images]
        self.values = list(zip(*(values for values, _ in runs), strict=True))
        self.written = runs[0][1]
        self.fixed = self._fixed(net)
        self.baked = False
        """Whether a segment that was made holds numbers that are right for one size of images alone."""
        self._last_read = {0: 0}
        for each in self.instructions:
            if each.number not in self.fixed or _holds_tensor(self.values[each.number][0]):
                self._last_read |= dict.fromkeys(each.reads(), each.number)
        self._last_read[output.number] = len(self.instructions) + 1

    def living(self, place: int) -> int | None:
        """The number of the one tensor that lives at a place. None where it is no place to cut."""
        living = [n for n, last in self._last_read.items() if n <= place < last and n not in self.fixed]
        if len(living) != 1 or self.written.get(living[0], 0) > place or not isinstance(self.values[living[0]][0], Tensor):
            return None
        behind = self.instructions[place:]
        again = self._again({n for each in behind for n in each.reads()}, place, living[0]) | self._lost(behind, place, living[0])
        return living[0] if all(self._can_run_again(n) or self._recipe(n, living[0]) is not None for n in again) else None

    def segment(self, start: int, stop: int) -> Segment:
        """The step from one place to cut to another: instructions start + 1 to stop, and before them what must be computed again."""
        living, result = self.living(start), self.living(stop) if stop < len(self.instructions) else self.output.number
        assert living is not None, "else it is no place to cut"
        assert result is not None, "else it is no place to cut"
        own = self.instructions[start:stop]
        again = self._again({n for each in own for n in each.reads()}, start, living)
        lost = self._lost(own, start, living)
        lines = [self._once_more(n, living) for n in sorted(again)]
        return segment([*lines, *(self._once_more(each.number, living) if each.number in lost else each for each in own)], living, result)

    def order(self, place: int) -> tuple[int, ...] | None:
        """The dimensions of the tensor that lives at a place in the order of its memory, as in `Block.input_order`."""
        x = self.values[self.living(place) or 0][0]
        return None if x.is_contiguous() else tuple(sorted(range(x.ndim), key=lambda d: (-x.stride(d), d)))

    def _lost(self, instructions: Iterable[Instruction], place: int, living: int) -> set[int]:
        """Numbers that these instructions behind a place would read from tensors that do not live there."""
        numbers = (each for each in instructions if not self._can_run_again(each.number) and each.number in self.fixed)
        return {each.number for each in numbers if any(n <= place and n != living for n in each.reads() - self.fixed)}

    def _fixed(self, net: nn.Module) -> set[int]:
        """Numbers of the values that do not depend on what the images show: numbers, and tensors made of parameters and numbers."""
        fixed: set[int] = set()
        for each in self.instructions:
            if not _holds_tensor(self.values[each.number][0]) or (
                each.reads() <= fixed and each.number not in self.written and _is_repeatable(net, each)
            ):
                fixed.add(each.number)
        return fixed

    def _can_run_again(self, number: int) -> bool:
        """Whether a fixed value comes from fixed values alone. Others are numbers that a tensor of images was asked for."""
        return number in self.fixed and self.instructions[number - 1].reads() <= self.fixed

    def _again(self, numbers: Iterable[int], place: int, living: int) -> set[int]:
        """Which fixed values from before a place must be had again behind it, for these numbers to be read there."""
        again: set[int] = set()
        to_do = [n for n in numbers if n <= place and n in self.fixed]
        while to_do:
            number = to_do.pop()
            if number not in again:
                again.add(number)
                to_do += [] if self._recipe(number, living) is not None else self.instructions[number - 1].reads() & self.fixed
        return again

    def _once_more(self, number: int, living: int) -> Instruction:
        found = self._recipe(number, living)
        if found is None:
            return self.instructions[number - 1]
        recipe = found[0]
        self.baked |= recipe is not Device and not isinstance(recipe, Dimension)
        return Instruction("function", number_from, (Ref(living), recipe), (), number)

    def _recipe(self, number: int, living: int) -> tuple[Any] | None:
        """How a number follows from the living tensor, in a tuple of one. None if it does not, or is no number."""
        one, other = self.values[number]
        if number not in self.fixed or _holds_tensor(one):
            return None
        try:
            return (_recipe(one, other, *(value.shape for value in self.values[living])),)
        except ValueError:
            return None


def used(instructions: Sequence[Instruction], output: Ref) -> tuple[list[Instruction], Ref]:
    """A program without what nothing reads: checks of the input's size, and the numbers that only those need. Numbered anew."""
    read = {output.number}
    lean = []
    for each in reversed(instructions):
        if each.number in read or not _is_idle(each):
            read |= each.reads()
            lean.append(each)
    numbers = {0: 0} | {each.number: i for i, each in enumerate(reversed(lean), 1)}
    return [renumbered(each, numbers) for each in reversed(lean)], Ref(numbers[output.number])


def _run(net: nn.Module, instructions: Sequence[Instruction], images: Tensor) -> tuple[list[Any], dict[int, int]]:
    """(the value of each number, number of each tensor that is written to in place to that of the last instruction that does)."""
    values: list[Any] = [images, *[None] * len(instructions)]
    versions = {0: images._version}
    written: dict[int, int] = {}
    for each in instructions:
        values[each.number] = each.run(net, values)
        if any(values[n]._version != versions[n] for n in each.reads() if n in versions):
            now = {n: values[n]._version for n in versions}
            written |= {n: each.number for n in versions if now[n] != versions[n]}
            versions = now
        if isinstance(values[each.number], Tensor):
            versions[each.number] = values[each.number]._version
    return values, written


def _is_repeatable(net: nn.Module, each: Instruction) -> bool:
    """Whether to run it twice changes nothing: no dropout, and no statistics of batches."""
    if each.op == "dropout":
        return False
    if each.op != "module":
        return "drop" not in str(getattr(each.target, "__name__", each.target)) and "rand" not in str(each.target)
    return not any(is_batch_norm(m) or "drop" in type(m).__name__.lower() for m in at(net, str(each.target)).modules())


def _is_idle(each: Instruction) -> bool:
    """Whether an instruction without a reader does nothing."""
    if each.op == "attribute" or each.target is torch._assert:
        return True
    if each.op == "function":
        return each.target is getattr or (getattr(each.target, "__module__", "") in ("_operator", "math") and not _is_in_place(each.target))
    return each.op == "method" and each.target in _NUMBERS


def _is_in_place(function: Any) -> bool:
    name = function.__name__
    return name in ("setitem", "delitem") or (name.startswith("i") and hasattr(operator, name[1:]))


def _holds_tensor(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return any(map(_holds_tensor, value))
    if isinstance(value, dict):
        return any(map(_holds_tensor, value.values()))
    return isinstance(value, Tensor | nn.Module | ModuleType)


def _recipe(one: Any, other: Any, shape: torch.Size, other_shape: torch.Size) -> Any:
    """For `number_from`, from two values of a number and the shapes of the tensor at hand in the same two runs. Raises ValueError."""
    if isinstance(one, tuple | list):
        if len(one) != len(other):
            raise ValueError
        parts = [_recipe(a, b, shape, other_shape) for a, b in zip(one, other, strict=True)]
        return parts if isinstance(one, list) else tuple(parts)
    if isinstance(one, torch.device):
        return Device
    if one == other and (one is None or isinstance(one, bool | int | float | str)):
        return one
    for dimension, sizes in enumerate(zip(shape, other_shape, strict=True)):
        if sizes == (one, other):
            return Dimension(dimension)
    raise ValueError
