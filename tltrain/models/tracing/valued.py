"""A tracer whose proxies know their values on the meta device, so that code which asks for shapes and types can be followed.

transformers' networks compare types, unpack shapes and build masks between their layers, where a plain proxy has no answer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves

from tltrain.models.tracing.tracer import Tracer

_BATCH = 1009
"""Size of the traced batch: a prime that no other dimension has, so that numbers which follow from it are told from the others."""
_KNOWN = ("dtype", "device", "layout", "requires_grad", "is_cuda", "is_sparse", "is_nested", "ndim")


class ValuedTracer(Tracer):
    """Follows a network for images of one size. Only numbers that depend on the size of the batch, and tensors, stay symbols."""

    def __init__(self, *args: Any, images: Tensor, units: Collection[str]) -> None:
        super().__init__(*args)
        self.images, self.units, self._running = images, units, False

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Modules with no unit in them are called as they are."""
        holds_unit = any(unit.startswith(f"{module_qualified_name}.") for unit in self.units)
        return not holds_unit or super().is_leaf_module(m, module_qualified_name)

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        return attr_val if self._running else super().getattr(attr, attr_val, parameter_proxy_cache)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._running:
            return forward(*args, **kwargs)
        if self._asks_for_sizes_alone(m, args, kwargs):
            name = next(name for name, _ in self.root.named_parameters())
            args = (self.create_proxy("call_function", blank, (self.create_proxy("get_attr", name, (), {}), self.images.shape[-1]), {}),)
        return super().call_module(m, forward, args, kwargs)

    def _asks_for_sizes_alone(self, m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a module makes of images what has no dimension of the batch: DINOv3's rotary tables, which hold for blank ones too."""
        given = _values(args)
        if kwargs or len(given) != 1 or getattr(given[0], "shape", None) != self.images.shape:
            return False
        if not self.is_leaf_module(m, self.path_of_module(m)):
            return False
        made = tree_leaves(self._value("call_module", self.path_of_module(m), given, {}))
        return all(isinstance(each, Tensor) and all(map(_is_plain, each.shape)) for each in made)

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """As `Tracer`'s. Of an object with logits and more, the logits are the output."""
        forward, images = super().create_args_for_root(root_fn, is_module, concrete_args)

        def logits() -> Any:
            out = forward()
            return out if isinstance(out, fx.Proxy) else getattr(out, "logits", out)

        return logits, images

    def proxy(self, node: fx.Node) -> ValuedProxy:
        return ValuedProxy(node, self)

    def create_proxy(self, kind: str, target: Any, args: Any, kwargs: Any, *_: Any, **__: Any) -> Any:
        """A proxy with its value, or the value itself where it is no tensor and does not depend on the size of the batch."""
        value = self._value(kind, target, _values(args), _values(kwargs))
        if kind in ("call_function", "call_method") and _is_plain(value):
            return value
        proxy = super().create_proxy(kind, target, args, kwargs)  # fx's own kind of proxy for parameters does not know their types
        proxy.__dict__["value"] = value
        return proxy

    def _value(self, kind: str, target: Any, args: Any, kwargs: Any) -> Any:
        self._running = True
        try:
            if kind == "placeholder":
                return self.images
            if kind == "get_attr":
                return _at(self.root, target)
            if kind == "call_module":
                return _at(self.root, target)(*args, **kwargs)
            if kind == "call_method":
                return getattr(args[0], target)(*args[1:], **kwargs)
            return target(*args, **kwargs) if kind == "call_function" else None
        finally:
            self._running = False


class ValuedProxy(fx.Proxy):
    """A tensor, or a number that follows from the size of the batch, with what it is in the traced batch."""

    value: Any

    def __getattr__(self, k: str) -> Any:
        value = self.__dict__.get("value")
        if isinstance(value, Tensor):
            if k == "shape":
                return self.size()
            if k in _KNOWN:
                return getattr(value, k)
        return super().__getattr__(k)

    def size(self, dim: int | None = None) -> Any:
        if dim is None:
            return tuple(self.size(i) for i in range(self.value.ndim))
        size = self.value.shape[dim]
        return size if _is_plain(size) else self.tracer.create_proxy("call_method", "size", (self, dim), {})

    def dim(self) -> int:
        return int(self.value.ndim)

    def is_floating_point(self) -> bool:
        return bool(self.value.is_floating_point())

    def __int__(self) -> int:
        return int(self.value)

    def __index__(self) -> int:
        return int(self.value)

    def __float__(self) -> float:
        return float(self.value)

    def __bool__(self) -> bool:
        if isinstance(self.value, Tensor):
            raise TypeError("it decides by what a tensor holds")
        return bool(self.value)

    def __len__(self) -> int:
        return len(self.value)

    def __iter__(self) -> Iterator[Any]:
        return iter([operator.getitem(self, i) for i in range(len(self.value))])


def blank(parameter: Tensor, size: int) -> Tensor:
    """One black image (1, 3, size, size), of the type and on the device that `Chain.normalise` gives images."""
    return torch.zeros((1, 3, size, size), dtype=parameter.dtype, device=parameter.device)


def images_of(net: nn.Module, size: int) -> Tensor:
    """The traced batch, on the meta device."""
    return torch.empty((_BATCH, 3, size, size), dtype=next(net.parameters()).dtype, device="meta")


def _values(argument: Any) -> Any:
    return fx.node.map_aggregate(argument, lambda each: each.value if isinstance(each, ValuedProxy) else each)


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    if isinstance(value, int) and not isinstance(value, bool):
        return value == 0 or value % _BATCH != 0
    return value is None or isinstance(value, bool | float | str | torch.dtype | torch.device | torch.memory_format)


def _at(root: Any, path: str) -> Any:
    for name in path.split("."):
        root = getattr(root, name)
    return root
