"""Chain on a small net of its own: freezing, ownership, copies, normalisation. Families: test_backbones_chains.py."""

from __future__ import annotations

import pickle
from copy import deepcopy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tltrain.core.errors import UserError
from tltrain.models.chain import Block, Chain, unit_classes
from tltrain.models.factory import drop_before
from tltrain.models.families.common import head_block


def _run(path: str, net: nn.Module, x: Tensor) -> Tensor:
    return net.get_submodule(path)(x)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)))


def _blocks(*paths: str) -> list[Block]:
    return [Block(path, (path,), partial(_run, path)) for path in paths]


def _chain() -> Chain:
    torch.manual_seed(0)
    return Chain(Net(), _blocks("stem", "body", "head"), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


def _images(dtype: torch.dtype = torch.uint8) -> Tensor:
    images = torch.randint(0, 256, (6, 3, 9, 9), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return images if dtype == torch.uint8 else images.to(dtype) / 255


def _train(chain: Chain, steps: int) -> None:
    """AdamW with weight decay over all parameters, those that do not train included."""
    optimizer = torch.optim.AdamW(chain.parameters(), lr=0.1, weight_decay=0.5)
    chain.train()
    for step in range(steps):
        loss = nn.functional.cross_entropy(chain(_images()), torch.arange(6) % 5)
        optimizer.zero_grad(set_to_none=step % 2 == 0)
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("training", [False, True])
def test_a_chain_is_its_net(training: bool) -> None:
    chain = _chain().train(training)
    want = deepcopy(chain.net)(chain.normalise(_images()))
    assert torch.equal(chain(_images()), want)


def test_uint8_and_floats_agree() -> None:
    chain = _chain().eval()
    assert torch.equal(chain(_images()), chain(_images(torch.float32)))


def test_normalisation_is_in_fp32_whatever_the_net_is() -> None:
    chain = _chain().eval()
    want = (_images().float() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(1, 3, 1, 1)) / torch.tensor([0.2, 0.3, 0.4]).view(1, 3, 1, 1)
    assert torch.equal(chain.normalise(_images()), want)
    half = _images().to(torch.bfloat16) / 255
    assert torch.equal(chain.normalise(half), chain.normalise(half.float()))
    assert chain.to(torch.bfloat16).normalise(_images()).dtype == torch.bfloat16
    assert torch.equal(chain.normalise(_images()), want.to(torch.bfloat16))
    chain.to(torch.float64)
    assert torch.equal(chain.normalise(_images()), want.double())


def test_mean_and_std_are_no_part_of_the_state() -> None:
    assert {name.removeprefix("net.") for name in _chain().state_dict()} == set(Net().state_dict())


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_frozen_blocks_stay_and_training_blocks_move(first: int) -> None:
    chain = _chain()
    _train(chain.freeze(0, norm_stats=True), steps=1)  # gradients are there, and must not live on
    chain.freeze(min(first, 2), norm_stats=True)
    before = deepcopy(chain.net.state_dict())
    if first < 3:
        _train(chain, steps=2)
    else:  # everything frozen: a teacher
        chain.freeze(3, norm_stats=True).train()
        chain(_images())
    after = chain.net.state_dict()
    names = ("stem", "body", "head")
    for name, tensor in after.items():
        frozen = names.index(name.split(".")[0]) < first
        if name.endswith(("weight", "running_mean", "running_var")):
            assert torch.equal(tensor, before[name]) == frozen, name
        elif frozen:
            assert torch.equal(tensor, before[name]), name


def test_statistics_of_training_blocks_can_stay() -> None:
    chain = _chain().freeze(0, norm_stats=False)
    before = deepcopy(chain.net.state_dict())
    _train(chain, steps=2)
    after = chain.net.state_dict()
    assert torch.equal(after["stem.1.running_mean"], before["stem.1.running_mean"])
    assert torch.equal(after["stem.1.num_batches_tracked"], before["stem.1.num_batches_tracked"])
    assert not torch.equal(after["stem.1.weight"], before["stem.1.weight"])


def test_freezing_is_a_state_not_a_history() -> None:
    """Frozen and unfrozen in any order: the last call decides; and it leaves no gradient behind."""
    chain = _chain().freeze(2, norm_stats=False).freeze(0, norm_stats=True).train()
    assert all(p.requires_grad for p in chain.parameters())
    assert all(m.training for m in chain.net.modules())
    chain(_images()).sum().backward()
    chain.freeze(2, norm_stats=True)
    assert all(p.grad is None for p in chain.parameters())
    assert [m.training for m in (chain.net.stem, chain.net.body, chain.net.head)] == [False, False, True]  # type: ignore[union-attr]
    assert not any(m.training for m in chain.eval().modules())


def test_a_copy_runs_its_own_weights() -> None:
    chain = _chain().eval()
    copy = deepcopy(chain)
    before = chain(_images())
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.zero_()
    assert torch.equal(chain(_images()), before)
    assert torch.count_nonzero(copy(_images())) == 0


def test_where_to_unfreeze() -> None:
    blocks = [Block(name, (path,), partial(_run, path)) for name, path in [("stem", "stem"), ("layer1.0", "body"), ("head", "head")]]
    chain = Chain(Net(), blocks, (0, 0, 0), (1, 1, 1))
    assert [chain.index(where) for where in ("all", "stem", "layer1", "layer1.0", "head")] == [0, 0, 1, 1, 2]
    with pytest.raises(UserError, match=r"'layer'.*all, stem, layer1\.0, head"):
        chain.index("layer")


def test_a_shared_weight_fails_by_name() -> None:
    net = Net()
    net.body[1].weight = net.stem[1].weight
    with pytest.raises(ValueError, match=r"body\.1\.weight of block body is the same tensor as one of block stem"):
        Chain(net, _blocks("stem", "body", "head"), (0, 0, 0), (1, 1, 1))


def test_a_shared_buffer_fails_by_name() -> None:
    net = Net()
    net.body[1].running_mean = net.stem[1].running_mean
    with pytest.raises(ValueError, match=r"body\.1\.running_mean of block body is the same tensor"):
        Chain(net, _blocks("stem", "body", "head"), (0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(
    ("paths", "message"),
    [
        (("stem", "head"), r"body\.0\.weight must belong to one block, and belongs to none"),
        (("stem", "body", "body.0", "head"), r"body\.0\.weight must belong to one block, and belongs to \['body', 'body\.0'\]"),
    ],
)
def test_a_tensor_without_one_owner_fails_by_name(paths: tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Chain(Net(), _blocks(*paths), (0, 0, 0), (1, 1, 1))


def _whole(*with_step: str) -> Chain:
    """The chain of `_chain`, of which only the blocks `with_step` could run alone."""
    torch.manual_seed(0)
    blocks = [block if block.name in with_step else replace(block, step=None) for block in _blocks("stem", "body", "head")]
    return Chain(Net(), blocks, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))


@pytest.mark.parametrize("with_step", [(), ("head",), ("stem", "body")])
def test_a_chain_of_blocks_without_steps_is_its_net(with_step: tuple[str, ...]) -> None:
    for training in (False, True):
        whole, chain = _whole(*with_step).train(training), _chain().train(training)
        assert whole.runs_whole
        assert not chain.runs_whole
        assert torch.equal(whole(_images()), chain(_images()))
        assert torch.equal(whole(_images(torch.float32), stop=3), chain(_images(torch.float32)))


@pytest.mark.parametrize(("start", "stop"), [(1, None), (0, 1), (0, 0), (1, 2)])
def test_a_chain_that_runs_whole_is_not_cut(start: int, stop: int | None) -> None:
    with pytest.raises(ValueError, match=f"runs whole, and cannot be run from block {start} to {stop}"):
        _whole("stem")(_images(), start=start, stop=stop)


def test_a_chain_that_runs_whole_is_not_recomputed() -> None:
    chain = _whole()
    chain.recompute = True
    with pytest.raises(ValueError, match="recomputed block by block"):
        chain(_images())


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("norm_stats", [False, True])
def test_freezing_trains_the_same_where_a_chain_runs_whole(first: int, norm_stats: bool) -> None:
    """Bit for bit, statistics included."""
    chains = [made().freeze(first, norm_stats) for made in (_chain, _whole)]
    for chain in chains:
        _train(chain, 3)
    states = [chain.net.state_dict() for chain in chains]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert unit_classes(chains[0]) == unit_classes(chains[1])


def test_the_logits_of_a_net_that_returns_more_are_taken() -> None:
    class Told(Net):
        def forward(self, x: Tensor) -> SimpleNamespace:  # type: ignore[override]
            return SimpleNamespace(logits=super().forward(x))

    torch.manual_seed(0)
    chain = Chain(Told(), [replace(block, step=None) for block in _blocks("stem", "body", "head")], (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    assert torch.equal(chain(_images()), _chain()(_images()))


def test_dropout_is_the_same_where_a_chain_runs_whole() -> None:
    whole, chain = _whole(), _chain()
    drop_before(whole.net, "head", 0.5)
    chain.blocks = (*chain.blocks[:2], head_block("head", 0.5))
    plain = _chain().eval()(_images())
    for made in (whole, deepcopy(whole), chain):
        assert torch.equal(made.eval()(_images()), plain)
    outs = []
    for made in (whole, deepcopy(whole), pickle.loads(pickle.dumps(whole)), chain):
        made.freeze(2, norm_stats=False).train()
        torch.manual_seed(3)
        outs.append(made(_images()))
    assert all(torch.equal(out, outs[0]) for out in outs)
    assert not torch.equal(outs[0], plain)
