"""A traced network as plain data: instructions that name modules and tensors by their paths, and hold none.

So a program survives deepcopy, pickle and a strategy that replaces parameters, and every module runs through its own call, hooks included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Ref:
    """The result of an earlier instruction, by its number. 0 is the program's input."""

    number: int


@dataclass(frozen=True)
class Instruction:
    """One node of a graph: `module` calls the module at a path, `attribute` reads a tensor, `function` and `method` call those.

    `dropout` drops as `F.dropout` does, while the module at a path trains.
    """

    op: str
    target: str | Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    number: int
    """Of its result."""
    scope: str = ""
    """Path of the module whose forward it was traced from."""
    forget: tuple[int, ...] = ()
    """Results that no later instruction reads. They are released, as they would be in the module's own forward."""

    def reads(self) -> set[int]:
        found: set[int] = set()
        mapped((self.args, self.kwargs), lambda ref: found.add(ref.number))
        return found

    def run(self, net: nn.Module, values: list[Any]) -> Any:
        target = self.target
        if self.op == "attribute":
            return at(net, target)  # type: ignore[arg-type]
        args = [_filled(arg, values) for arg in self.args]
        kwargs = {name: _filled(arg, values) for name, arg in self.kwargs}
        if self.op == "module":
            return at(net, target)(*args, **kwargs)  # type: ignore[arg-type]
        if self.op == "dropout":
            return F.dropout(*args, **{**kwargs, "training": at(net, target).training})  # type: ignore[arg-type]
        if self.op == "method":
            return getattr(args[0], target)(*args[1:], **kwargs)  # type: ignore[arg-type]
        return target(*args, **kwargs)  # type: ignore[operator]


@dataclass(frozen=True)
class Segment:
    """The step of a block: instructions from one tensor to one tensor. (net, x) -> x."""

    instructions: tuple[Instruction, ...]
    result: int
    num_values: int
    size: int | None = None
    """Side of the images that it is for, pixels, where it holds numbers that depend on it. None takes every size."""

    def __call__(self, net: nn.Module, x: Tensor) -> Tensor:
        if self.size is not None and tuple(x.shape[-2:]) != (self.size, self.size):
            raise ValueError(f"the network was cut for images of {self.size} x {self.size} pixels, and these are {tuple(x.shape[-2:])}")
        values: list[Any] = [None] * self.num_values
        values[0] = x
        del x  # the input is released after its last use, too
        for each in self.instructions:
            values[each.number] = each.run(net, values)
            for number in each.forget:
                values[number] = None
        out: Tensor = values[self.result]
        return out


def segment(instructions: Sequence[Instruction], input_number: int, result: int, size: int | None = None) -> Segment:
    """A segment of instructions, in order. Their results are numbered anew; `input_number` becomes 0."""
    numbers = {input_number: 0} | {each.number: i for i, each in enumerate(instructions, 1)}
    last = {number: i for i, each in enumerate(instructions) for number in (*each.reads(), each.number)}
    last.pop(result, None)
    last.setdefault(input_number, 0)
    if input_number == result:
        del last[input_number]
    forget = [tuple(sorted(numbers[n] for n, at_end in last.items() if at_end == i)) for i in range(len(instructions))]
    lean = [replace(renumbered(each, numbers), forget=forget[i]) for i, each in enumerate(instructions)]
    return Segment(tuple(lean), numbers[result], len(lean) + 1, size)


def renumbered(each: Instruction, numbers: Mapping[int, int]) -> Instruction:
    """The same instruction with other numbers for its result, and for those that it reads."""
    args, kwargs = (mapped(given, lambda ref: Ref(numbers[ref.number])) for given in (each.args, each.kwargs))
    return replace(each, args=args, kwargs=kwargs, number=numbers[each.number])


def at(net: nn.Module, path: str) -> Any:
    """The module, parameter, buffer or attribute at a path."""
    found: Any = net
    for name in path.split("."):
        found = getattr(found, name)
    return found


def mapped(argument: Any, of: Callable[[Ref], Any]) -> Any:
    """The same nest of tuples, lists, dicts and slices with each Ref replaced by `of` it."""
    kind = type(argument)
    if kind is Ref:
        return of(argument)
    if kind is tuple or kind is list:
        return kind(mapped(each, of) for each in argument)
    if kind is dict:
        return {key: mapped(each, of) for key, each in argument.items()}
    if kind is slice:
        return slice(mapped(argument.start, of), mapped(argument.stop, of), mapped(argument.step, of))
    return argument


def _filled(argument: Any, values: list[Any]) -> Any:
    kind = type(argument)
    if kind is Ref:
        return values[argument.number]
    if kind is tuple or kind is list:
        return kind(_filled(each, values) for each in argument)
    return mapped(argument, lambda ref: values[ref.number]) if kind is dict or kind is slice else argument
