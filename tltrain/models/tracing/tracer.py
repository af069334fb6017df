"""From a network to a program, with torch.fx: what does not depend on the images alone is found, and left to the modules themselves."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import fx, nn

from tltrain.core.errors import first_line
from tltrain.models.tracing.program import Instruction, Ref
from tltrain.models.tracing.structure import around

_OPS = {"call_module": "module", "get_attr": "attribute", "call_function": "function", "call_method": "method"}
_MOST_TRIES = 200


class CannotCut(Exception):
    """A network that cannot be cut. Its text says why, in a few words that follow a colon: `its forward reads self.training`."""


def traced(
    net: nn.Module,
    leaves: Collection[str],
    leaf_modules: Collection[type[nn.Module]],
    leaf_functions: Collection[Callable[..., Any]],
    forward_defaults: Mapping[str, Any],
    make: Callable[..., Tracer],
) -> tuple[list[Instruction], Any]:
    """The instructions of a network, and its output as a nest of Refs. `net` is changed by this: give a copy (`ghost`).

    make: Tracer, or what makes another one of the same arguments.
    leaves: paths of modules that are called and not traced into. A module whose forward cannot be traced, or differs between training
    and evaluation, becomes one too.
    Raises CannotCut where the network's own forward is such a one.
    """
    leaves = set(leaves)
    for _ in range(_MOST_TRIES):
        tracers = []
        for training in (False, True):
            net.train(training)
            tracer = make(leaves, tuple(leaf_modules), tuple(leaf_functions), forward_defaults)
            try:
                tracer.trace(net)
            except Exception as error:  # whatever a network's code raises at a value that is not there
                if tracer.failed is None:
                    raise CannotCut(f"{type(net).__name__}.forward cannot be traced ({reason(error)})") from error
                leaves.add(tracer.failed)
                break
            tracers.append(tracer)
        else:
            programs = [_program(tracer.graph) for tracer in tracers]
            differs = _first_difference(*programs)
            if differs is None:
                net.eval()
                return programs[0]
            while differs in leaves:  # it is not called itself, but a module around it is
                differs = differs.rpartition(".")[0]
            if not differs:
                raise CannotCut(f"{type(net).__name__}.forward is another one in training")
            leaves.add(differs)
    raise CannotCut("too many of its modules cannot be traced")


def ghost(net: nn.Module) -> nn.Module:
    """A copy of a net on the meta device, without hooks. It takes no memory, and what is done to it does not reach the net."""
    tensors = [*net.parameters(), *net.buffers(), *(t for m in net.modules() for t in vars(m).values() if isinstance(t, torch.Tensor))]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        bare = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(bare, bare.is_floating_point()) if isinstance(tensor, nn.Parameter) else bare
    copied = copy.deepcopy(net, memo)
    for module in copied.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied


class Tracer(fx.Tracer):
    """fx's tracer, which remembers the innermost module whose forward it could not follow."""

    proxy_buffer_attributes = True

    def __init__(
        self,
        leaves: Collection[str],
        leaf_modules: tuple[type[nn.Module], ...],
        leaf_functions: tuple[Callable[..., Any], ...],
        forward_defaults: Mapping[str, Any],
    ) -> None:
        super().__init__(autowrap_functions=leaf_functions, param_shapes_constant=True)
        self.leaves, self.leaf_modules, self.forward_defaults = leaves, leaf_modules, forward_defaults
        self.failed: str | None = None
        self.paths: dict[int, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return module_qualified_name in self.leaves or isinstance(m, self.leaf_modules) or super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or self.path_of_module(m)
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """As fx's, but the shape of a buffer is known too."""
        path = self.paths.get(id(attr_val)) if isinstance(attr_val, torch.Tensor) else None
        if path is None:
            return attr_val
        if path not in parameter_proxy_cache:
            parameter_proxy_cache[path] = self.create_proxy(
                "get_attr", path, (), {}, proxy_factory_fn=lambda node: _Kept(self, node, attr_val.shape)
            )
        return parameter_proxy_cache[path]

    def create_args_for_root(self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """The images alone are an input; other arguments of the net's forward have the values of `forward_defaults`, or their own."""
        tensors = [*self.root.named_parameters(), *self.root.named_buffers()]
        self.paths = {id(tensor): path for path, tensor in tensors}
        images = self.create_proxy("placeholder", "images", (), {})

        def forward() -> Any:
            return root_fn(self.root, images, **self.forward_defaults)

        return forward, []

    def create_arg(self, a: Any) -> Any:
        """As fx's, but a tensor that the forward makes, which fx would hang onto the net, stops the trace."""
        known = not isinstance(a, torch.Tensor) or isinstance(a, nn.Parameter) or a in self.tensor_attrs
        if not known and not any(a is buffer for buffer in self.root.buffers()):
            raise TypeError("it makes a tensor of its own")
        return super().create_arg(a)


class _Kept(fx.Proxy):
    """A parameter or a buffer, whose shape does not depend on the images."""

    def __init__(self, tracer: fx.Tracer, node: fx.Node, shape: torch.Size) -> None:
        super().__init__(node, tracer)
        self.__dict__["shape"] = shape

    def size(self, dim: int | None = None) -> Any:
        shape: torch.Size = self.__dict__["shape"]
        return shape if dim is None else shape[dim]

    def dim(self) -> int:
        return len(self.size())

    @property
    def ndim(self) -> int:
        return len(self.size())

    def numel(self) -> int:
        return int(self.size().numel())

    def __len__(self) -> int:
        return int(self.size(0))


def _program(graph: fx.Graph) -> tuple[list[Instruction], Any]:
    numbers: dict[fx.Node, int] = {}
    instructions: list[Instruction] = []
    output = None
    for node in graph.nodes:
        args, kwargs = _plain(node.args, numbers), _plain(node.kwargs, numbers)
        if node.op == "output":
            output = args[0]
        elif node.op == "placeholder":
            numbers[node] = 0
        else:
            numbers[node] = len(instructions) + 1
            stack = node.meta.get("nn_module_stack") or {}
            scopes = [path for path, _ in stack.values()]
            scope = (scopes[-2:-1] if node.op == "call_module" else scopes[-1:]) or [""]
            op, target = _OPS[node.op], node.target
            called = [each.target for each in instructions if each.op == "module"]
            if target is nn.functional.dropout and "training" in kwargs and called:
                # A network's own flag is on while its last blocks are frozen. The module before the dropout tells whether its block trains.
                op, target = "dropout", called[-1]
                del kwargs["training"]
            instructions.append(Instruction(op, target, args, tuple(kwargs.items()), numbers[node], scope[0]))
    return instructions, output


def _plain(argument: Any, numbers: Mapping[fx.Node, int]) -> Any:
    """An fx argument with plain lists and dicts, and Refs for nodes."""
    if isinstance(argument, fx.Node):
        return Ref(numbers[argument])
    if isinstance(argument, tuple):
        return tuple(_plain(each, numbers) for each in argument)
    if isinstance(argument, list):
        return [_plain(each, numbers) for each in argument]
    if isinstance(argument, dict):
        return {key: _plain(each, numbers) for key, each in argument.items()}
    if isinstance(argument, slice):
        return slice(*(_plain(each, numbers) for each in (argument.start, argument.stop, argument.step)))
    return argument


def _first_difference(one: tuple[list[Instruction], Any], other: tuple[list[Instruction], Any]) -> str | None:
    """Path of the innermost module in which two programs differ first, "" for the net itself. None if they are the same."""
    for a, b in zip(one[0], other[0], strict=False):
        if a != b:
            return around(a.scope, b.scope)
    if len(one[0]) != len(other[0]):
        longer = max(one[0], other[0], key=len)
        return longer[min(len(one[0]), len(other[0]))].scope
    return None if one[1] == other[1] else ""


def reason(error: Exception) -> str:
    """Why tracing failed, in at most 120 characters."""
    return first_line(error)[:120].rstrip(".")
