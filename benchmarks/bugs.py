"""Bugs that give no error of their own, planted in the processes of a world: the guards must find them."""

from __future__ import annotations

from typing import Any

from benchmarks.plants import after_train, own_rank, wrap


def say_who_asks(fault: str, *arguments: Any) -> None:
    """Another bug of this file; a process that then asks whether another one is gone says so."""
    from tltrain.distributed.watchdog import Watch

    def around(original: Any, self: Watch) -> Any:
        print("asks who is missing")
        return original(self)

    wrap(Watch, "missing", around)
    globals()[fault](*arguments)


def unfreeze_after_wrapping(block: str) -> None:
    """Freeze a block, wrap, and unfreeze it: DDP then never synchronises its gradients, without a word."""
    from tltrain.training import stage

    def around(original: Any, runtime: Any, chain: Any, *rest: Any) -> Any:
        parameters = [p for _, p in chain.parameters_of(chain.index(block))]
        for parameter in parameters:
            parameter.requires_grad_(False)
        spreaded = original(runtime, chain, *rest)
        for parameter in parameters:
            parameter.requires_grad_(True)
        return spreaded

    wrap(stage, "spread", around)


def move_buffer(num_steps: int, rank: int | None, block: str) -> None:
    """A buffer of a block changes on one rank alone, or, for None, on all alike."""

    def move(spreaded: Any) -> None:
        chain = spreaded.chain
        next(b for _, m in chain.modules_of(chain.index(block)) for b in m.buffers(recurse=False) if b.is_floating_point()).add_(1e-3)

    if rank in (None, own_rank()):
        after_train(num_steps, move)


def move_frozen(num_steps: int, block: str) -> None:
    """A parameter of a frozen block changes, on every rank."""

    def move(spreaded: Any) -> None:
        from tltrain.distributed.strategies.consistency import _local

        _, parameter = next(spreaded.chain.parameters_of(spreaded.chain.index(block)))
        _local(parameter).add_(1e-3)

    after_train(num_steps, move)


def hold_block(block: str) -> None:
    """The optimizer knows a block, and its learning rate is zero."""
    from tltrain.training import loop

    def around(original: Any, optimizer: Any, factor: float) -> None:
        original(optimizer, factor)
        for group in optimizer.param_groups:
            group["lr"] *= group["name"].split("/")[0] != block

    wrap(loop, "set_lr", around)


def forget_block(block: str) -> None:
    """The optimizer does not know a block that trains."""
    from tltrain.training import optim

    def around(original: Any, groups: Any, spec: Any) -> Any:
        return original([g for g in groups if g["name"].split("/")[0] != block], spec)

    wrap(optim, "make_optimizer", around)
