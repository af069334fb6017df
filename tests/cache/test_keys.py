"""What decides the bytes of a stored row decides its key, entry by entry; what does not decide them leaves the key alone."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import numpy as np
import PIL
import pytest
import torch
from conftest import made_recipe
from PIL import features
from torch import Tensor, nn

from tltrain.cache import disk_store, image_cache, keys
from tltrain.cache.frozen import FrozenModel
from tltrain.cache.keys import CacheContext
from tltrain.core.recipe import Augment, Recipe
from tltrain.data import DataSplits, Split, decode, open_images
from tltrain.data.sampler import FiniteMixing
from tltrain.data.views import Preprocess
from tltrain.models import factory
from tltrain.models.chain import Block, Chain
from tltrain.models.factory import Loaded

CUT = 3
CPU = torch.device("cpu")
WHOLE = ("blocks", "config", "normalise.0", "normalise.1")
"""Entries that are as long as the network is deep, or as its configuration: each is one here."""


@dataclass(frozen=True)
class Machine:
    """What a key says of a Runtime."""

    device: torch.device = CPU
    precision: str = "no"


@dataclass(frozen=True)
class Asked:
    """Everything that a row's key is made from: a real network and real images."""

    recipe: Recipe
    images: DataSplits
    student: Loaded
    loaded: Loaded
    frozen: FrozenModel
    split: Split
    runtime: Machine = Machine()
    kind: str = "features"
    augment: Augment = "light"
    num_views: int = 2
    erasing: float = 0.1
    mixing: FiniteMixing | None = None

    def key(self) -> dict[str, Any]:
        machine = self.runtime
        context = CacheContext.of(self.recipe, self.images, self.student.preprocess, machine.device, machine.precision)
        of_views = self.augment, self.num_views, self.erasing, self.mixing
        return keys.row_key(context, self.kind, self.frozen, self.loaded, self.split, *of_views)


Patch = pytest.MonkeyPatch
Change = Callable[[Asked, Patch], Asked]


@pytest.fixture(scope="module")
def asked() -> Asked:
    recipe = made_recipe(backbone={"name": "vit-tiny"}, data={"val_fraction": 0.2})
    images = open_images(recipe.data)
    data = recipe.data
    loaded = factory.load(recipe.backbone, classes=images.classes, size=data.size, resize=data.resize, head="new", seed=0)
    return Asked(recipe, images, loaded, loaded, FrozenModel(loaded.chain, CUT, torch.float32, 32, nullcontext), images.train)


@pytest.fixture(autouse=True)
def _settings_of_torch() -> Iterator[None]:
    threads, products, convolutions = torch.get_num_threads(), torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cudnn.allow_tf32 = convolutions
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(products)


def leaves(key: dict[str, Any]) -> dict[str, str]:
    """Path to value, as JSON, of every entry of a key."""
    found: dict[str, str] = {}

    def walk(path: str, value: Any) -> None:
        children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        if path in WHOLE or not isinstance(value, dict | list):
            found[path] = json.dumps(value, sort_keys=True)
        for name, child in () if path in WHOLE else children:
            walk(f"{path}.{name}" if path else str(name), child)

    walk("", key)
    return found


def changed(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The entries that two keys differ in."""
    ours, theirs = leaves(before), leaves(after)
    return {path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)}


# --- what changes a key: one entry each


def _fields(**values: Any) -> Change:
    return lambda asked, _: replace(asked, **values)


def _recipe(**values: Any) -> Change:
    return lambda asked, _: replace(asked, recipe=asked.recipe.model_copy(update=values))


def _data(**values: Any) -> Change:
    return lambda asked, _: replace(asked, recipe=asked.recipe.model_copy(update={"data": asked.recipe.data.model_copy(update=values)}))


def _frozen(**values: Any) -> Change:
    return lambda asked, _: replace(asked, frozen=replace(asked.frozen, **values))


def _card(**values: Any) -> Change:
    """Of the student: what the images of a teacher look like too."""
    return lambda asked, _: replace(asked, student=replace(asked.student, card=replace(asked.student.card, **values)))


def _split(**values: Any) -> Change:
    return lambda asked, _: replace(asked, split=replace(asked.split, **values))


def _chain(change: Callable[[Chain], Chain]) -> Change:
    """Another chain in the place of a copy of the frozen one."""
    return lambda asked, _: replace(asked, frozen=replace(asked.frozen, chain=change(copy.deepcopy(asked.frozen.chain))))


def _patched(target: Any, name: str, value: Any) -> Change:
    def change(asked: Asked, patch: Patch) -> Asked:
        patch.setattr(target, name, value)
        return asked

    return change


def _version(package: str) -> Change:
    return _patched(keys, "version", lambda name: "0" if name == package else version(name))


KNOWN = {*features.modules, *features.codecs, *features.features}
LIBRARIES = [name for name in ("jpg", "libjpeg_turbo", "libtiff", "webp", "avif", "jpg_2000", "littlecms2") if name in KNOWN]


def _other_codec(library: str) -> tuple[Any, str, Any]:
    """What to patch, so that Pillow says another version of one library behind it."""
    found = image_cache.codecs()
    return features, "version", lambda name: "0" if name == library else found[name]


def _tf32(asked: Asked, patch: Patch) -> Asked:
    patch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    return asked


def _products(asked: Asked, _: Patch) -> Asked:
    torch.set_float32_matmul_precision("high")
    return asked


def _convolutions(asked: Asked, _: Patch) -> Asked:
    torch.backends.cudnn.allow_tf32 = not torch.backends.cudnn.allow_tf32
    return asked


def _threads(asked: Asked, _: Patch) -> Asked:
    torch.set_num_threads(torch.get_num_threads() + 1)
    return asked


def _cuda(name: str | None) -> Change:
    """A GPU of this name; None: of the processor's own, so that the kind of device alone differs."""

    def change(asked: Asked, patch: Patch) -> Asked:
        patch.setattr(torch.cuda, "get_device_name", lambda device: name or asked.key()["device"][1])
        return replace(asked, runtime=replace(asked.runtime, device=torch.device("cuda")))

    return change


def _learned(chain: Chain) -> Chain:
    with torch.no_grad():
        next(chain.parameters_of(0))[1].view(-1)[0] += 1e-6
    return chain


def _renamed(chain: Chain) -> Chain:
    return Chain(chain.net, [replace(chain.blocks[0], name="other"), *chain.blocks[1:]], chain.mean, chain.std)


CASES: dict[str, tuple[str, Change]] = {
    "kind": ("kind", _fields(kind="logits")),
    "format": ("format", _patched(keys, "FORMAT", 2)),
    "weights": ("weights", _chain(_learned)),
    "blocks": ("blocks", _chain(_renamed)),
    "config": ("config", lambda asked, _: replace(asked, loaded=_with_config(asked.loaded, layer_norm_eps=1e-3))),
    "mean": ("normalise.0", _chain(lambda chain: Chain(chain.net, chain.blocks, (0.1, 0.2, 0.3), chain.std))),
    "std": ("normalise.1", _chain(lambda chain: Chain(chain.net, chain.blocks, chain.mean, (0.1, 0.2, 0.3)))),
    "size": ("view.0", _card(size=24)),
    "resize": ("view.1", _card(resize=40)),
    "interpolation": ("view.2", _card(interpolation="bicubic")),
    "augment": ("augment.0", _fields(augment="rand")),
    "flip": ("augment.1", _data(flip=True)),
    "data.seed": ("augment.2", _data(seed=1)),
    "version of the augmentation": ("augment.3", _patched(keys, "PIXELS_VERSION", {"light": 2})),
    "erasing": ("augment.4", _fields(erasing=0.2)),
    "dtype": ("dtype", _frozen(dtype=torch.bfloat16)),
    "chunk": ("chunk", _frozen(chunk=64)),
    "images": ("data.0", lambda asked, _: replace(asked, images=replace(asked.images, fingerprint="other"))),
    "split": ("data.1", _split(name="val")),
    "samples": ("data.2", _split(labels=np.zeros(7, np.int64))),
    "device": ("device.0", _cuda(None)),
    "processor": ("device.1", _patched(torch.backends.cpu, "get_cpu_capability", lambda: "other")),
    "threads": ("device.1", _threads),
    "precision": ("device.2", _fields(runtime=Machine(precision="bf16"))),
    "deterministic": ("device.3", _recipe(deterministic=False)),
    **{name: (f"versions.{name}", _version(name)) for name in ("torch", "torchvision", "pillow", "numpy", "transformers")},
    "cuda": ("versions.cuda", _patched(torch.version, "cuda", "0.0")),
    "cudnn": ("versions.cudnn", _patched(torch.backends.cudnn, "version", lambda: 1)),
    **{name: (f"versions.codecs.{name}", _patched(*_other_codec(name))) for name in LIBRARIES},
    "heif": ("versions.codecs.heif", _patched(image_cache, "heif_version", lambda: "0")),
    "decoder": ("versions.codecs.decoder", _patched(decode, "VERSION", 0)),
    "products": ("products.0", _products),
    "tf32": ("products.1", _tf32),
    "convolutions": ("products.2", _convolutions),
}


def _with_config(loaded: Loaded, **values: Any) -> Loaded:
    return replace(loaded, card=replace(loaded.card, config=loaded.card.config | values))


@pytest.mark.parametrize("name", CASES)
def test_each_entry_of_a_rows_key_changes_with_what_it_stands_for(name: str, asked: Asked, monkeypatch: Patch) -> None:
    entry, change = CASES[name]
    before = asked.key()
    after = change(asked, monkeypatch).key()
    assert changed(before, after) == {entry}
    assert disk_store.digest(before) != disk_store.digest(after)


def test_every_entry_of_a_rows_key_has_a_case(asked: Asked) -> None:
    assert set(leaves(asked.key())) == {entry for entry, _ in CASES.values()}
    assert json.loads(json.dumps(asked.key())) == asked.key()


MIXING = FiniteMixing(seed=3, number_N=np.arange(9), mixup=0.2, cutmix=1.0, size=32)


@pytest.mark.parametrize(
    ("values", "entry"),
    [({"mixup": 0.3}, 1), ({"cutmix": 0.0}, 2), ({"seed": 4}, 3), ({"weight_N": np.ones(9)}, 4)],
    ids=["mixup", "cutmix", "data.seed", "balanced partners"],
)
def test_what_mixes_views_counts_where_they_are_mixed(asked: Asked, values: dict[str, Any], entry: int) -> None:
    before, after = (replace(asked, mixing=mixing).key() for mixing in (MIXING, replace(MIXING, **values)))
    assert changed(before, after) == {f"mixed.{entry}"}
    assert json.loads(json.dumps(before)) == before
    assert "mixed" not in asked.key(), "what was stored of views that are not mixed is still read"
    alone = replace(asked, num_views=1)
    assert {entry.partition(".")[0] for entry in changed(alone.key(), replace(alone, mixing=MIXING).key())} == {"mixed"}


def test_what_computes_a_mixture_counts(asked: Asked, monkeypatch: Patch) -> None:
    mixed = replace(asked, mixing=MIXING)
    before = mixed.key()
    with monkeypatch.context() as patch:
        patch.setattr(keys, "MIXING_VERSION", 2)
        assert changed(before, mixed.key()) == {"mixed.0"}
    assert changed(before, _version("scipy")(mixed, monkeypatch).key()) == {"mixed.5"}


def test_every_value_of_a_configuration_counts_but_the_names_of_classes(asked: Asked) -> None:
    config = asked.loaded.card.config | {"id2label": {"0": "a"}, "label2id": {"a": 0}}
    assert len(config) > 10
    counts = {name for name in config if changed(asked.key(), replace(asked, loaded=_with_config(asked.loaded, **{name: "other"})).key())}
    assert counts == set(config) - {"id2label", "label2id"}


def test_the_version_of_another_library_counts_for_its_networks_alone(asked: Asked, monkeypatch: Patch) -> None:
    class Theirs(nn.Identity):
        __module__ = "psutil.models"

    chain = copy.deepcopy(asked.frozen.chain)
    chain.net.add_module("theirs", Theirs())
    other = replace(asked, frozen=replace(asked.frozen, chain=chain))
    assert changed(asked.key(), other.key()) == {"versions.psutil"}
    before = other.key()
    assert changed(before, _version("psutil")(other, monkeypatch).key()) == {"versions.psutil"}
    assert changed(asked.key(), asked.key()) == set()


def test_views_whose_pixels_have_not_changed_keep_the_key_they_had_and_others_do_not(asked: Asked) -> None:
    """What is stored of light views is still read. Strong ones had black corners."""
    keys_of = {augment: replace(asked, augment=augment, erasing=0.0).key()["augment"] for augment in ("light", "strong", "trivial")}
    assert keys_of == {"light": ["light", False, 0], "strong": ["strong", False, 0, 2, 0.0], "trivial": ["trivial", False, 0]}
    assert replace(asked, augment="none").key()["augment"] == ["none", False, 0, 1, 0.1]


def test_another_gpu_is_another_device(asked: Asked, monkeypatch: Patch) -> None:
    one, other = (_cuda(name)(asked, monkeypatch).key() for name in ("NVIDIA H100", "NVIDIA A100"))
    assert (one["device"][1], other["device"][1]) == ("NVIDIA H100", "NVIDIA A100")


def test_without_a_dtype_of_its_own_a_prefix_answers_in_that_of_its_parameters(asked: Asked) -> None:
    plain = replace(asked, frozen=replace(asked.frozen, dtype=None))
    assert changed(asked.key(), plain.key()) == set()
    double = replace(asked, frozen=replace(plain.frozen, chain=copy.deepcopy(plain.frozen.chain).double()))
    assert changed(asked.key(), double.key()) == {"dtype", "weights"}


# --- what changes no key


def _head(chain: Chain) -> Chain:
    for i in range(CUT, len(chain.blocks)):
        for _, parameter in chain.parameters_of(i):
            nn.init.ones_(parameter)
    return chain


def _evaluation_view(change: Change) -> Change:
    return lambda asked, patch: change(replace(asked, num_views=1), patch)


def _plain_views(change: Change) -> Change:
    return lambda asked, patch: change(replace(asked, augment="none", erasing=0.0), patch)


def _other_stages(asked: Asked, _: Patch) -> Asked:
    stage = asked.recipe.stages[0].model_copy(update={"lr": 0.7, "steps": 3, "weight_decay": 0.1, "mixup": 0.0, "label_smoothing": 0.1})
    return replace(asked, recipe=asked.recipe.model_copy(update={"stages": (stage,)}))


NO_CASES: dict[str, tuple[Change, Change]] = {
    "the recipe's seed": (_fields(), _recipe(seed=7)),
    "the batch, the name, the metric": (_fields(), _recipe(batch=7, name="other", select="loss")),
    "learning rates and lengths": (_fields(), _other_stages),
    "names of classes": (_fields(), lambda asked, _: replace(asked, loaded=_with_config(asked.loaded, id2label={"0": "a"}, label2id={}))),
    "where the weights come from": (_fields(), lambda asked, _: replace(asked, loaded=replace(asked.loaded, origin="other"))),
    "blocks behind the cut": (_fields(), _chain(_head)),
    "erasing where only the evaluation view is asked for": (_fields(num_views=1), _evaluation_view(_fields(erasing=0.9))),
    "augment where only the evaluation view is asked for": (_fields(num_views=1), _evaluation_view(_fields(augment="strong"))),
    "no augment where only the evaluation view is asked for": (_fields(num_views=1), _evaluation_view(_fields(augment="none"))),
    "flip where only the evaluation view is asked for": (_fields(num_views=1), _evaluation_view(_data(flip=True))),
    "data.seed where only the evaluation view is asked for": (_fields(num_views=1), _evaluation_view(_data(seed=1))),
    "flip where nothing augments": (_fields(augment="none", erasing=0.0), _plain_views(_data(flip=True))),
    "data.seed where nothing augments": (_fields(augment="none", erasing=0.0), _plain_views(_data(seed=1))),
    "the number of views where nothing augments": (_fields(augment="none", erasing=0.0), _fields(augment="none", erasing=0.0, num_views=4)),
}


@pytest.mark.parametrize("name", NO_CASES)
def test_what_does_not_decide_a_rows_bytes_is_in_no_key(name: str, asked: Asked, monkeypatch: Patch) -> None:
    before, after = (change(asked, monkeypatch) for change in NO_CASES[name])
    assert before != after
    assert before.key() == after.key()


# --- base images

BASE_CASES: dict[str, tuple[str, tuple[Any, ...], tuple[Any, str, Any] | None]] = {
    "images": ("data", ("other", "train", Preprocess(32, 36)), None),
    "split": ("split", ("data", "val", Preprocess(32, 36)), None),
    "resize": ("resize", ("data", "train", Preprocess(32, 40)), None),
    "interpolation": ("interpolation", ("data", "train", Preprocess(32, 36, "bicubic")), None),
    "images of a shard": ("images", ("data", "train", Preprocess(32, 36)), (image_cache, "SHARD_IMAGES", 64)),
    "format": ("format", ("data", "train", Preprocess(32, 36)), (image_cache, "FORMAT", 2)),
    "pillow": ("pillow", ("data", "train", Preprocess(32, 36)), (PIL, "__version__", "0")),
    **{name: (f"codecs.{name}", ("data", "train", Preprocess(32, 36)), _other_codec(name)) for name in LIBRARIES},
    "heif": ("codecs.heif", ("data", "train", Preprocess(32, 36)), (image_cache, "heif_version", lambda: "0")),
    "decoder": ("codecs.decoder", ("data", "train", Preprocess(32, 36)), (decode, "VERSION", 0)),
}


@pytest.mark.parametrize("name", BASE_CASES)
def test_each_entry_of_a_base_images_key_changes_with_what_it_stands_for(name: str, monkeypatch: Patch) -> None:
    entry, given, patch = BASE_CASES[name]
    before = image_cache.key("data", "train", Preprocess(32, 36))
    if patch is not None:
        monkeypatch.setattr(*patch)
    after = image_cache.key(*given)
    assert changed(before, after) == {entry}
    assert disk_store.digest(before) != disk_store.digest(after)


def test_every_entry_of_a_base_images_key_has_a_case() -> None:
    assert set(leaves(image_cache.key("data", "train", Preprocess(32, 36)))) == {entry for entry, _, _ in BASE_CASES.values()}


# --- the fingerprint of what is frozen


def _nothing(net: nn.Module, x: Tensor) -> Tensor:
    return x


def _fingerprint(change: Callable[[Any], object] = lambda net: None, first: str = "first") -> str:
    """Of the first two blocks of a small network whose every tensor is zero, changed."""
    layers = {first: nn.Conv2d(3, 4, 2), "norm": nn.BatchNorm2d(4), "last": nn.Linear(4, 2)}
    net = nn.Sequential(OrderedDict(layers))
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.data.zero_()
    change(net)
    chain = Chain(net, [Block(name, (name,), _nothing) for name in layers], (0.5,) * 3, (0.5,) * 3)
    return FrozenModel(chain, 2, None, None, nullcontext).fingerprint


def _reshaped(net: Any) -> None:
    net.first.weight = nn.Parameter(net.first.weight.detach().reshape(4, 2, 3, 2))


def test_a_fingerprint_is_of_values_names_dtypes_and_shapes_of_parameters_and_buffers() -> None:
    changes: dict[str, str] = {
        "nothing": _fingerprint(),
        "a weight": _fingerprint(lambda net: net.first.weight.data[3, 2, 1, 1].fill_(1e-30)),
        "a bias": _fingerprint(lambda net: net.first.bias.data[0].fill_(1)),
        "the same weight in another place": _fingerprint(lambda net: net.norm.weight.data[0].fill_(1)),
        "a running mean": _fingerprint(lambda net: net.norm.running_mean[3].fill_(1)),
        "a running variance": _fingerprint(lambda net: net.norm.running_var[3].fill_(1)),
        "a count of batches": _fingerprint(lambda net: net.norm.num_batches_tracked.fill_(1)),
        "a name": _fingerprint(first="begin"),
        "a dtype": _fingerprint(lambda net: net.half()),
        "another dtype of the same bytes": _fingerprint(lambda net: net.bfloat16()),
        "a shape of the same bytes": _fingerprint(_reshaped),
    }
    assert len(set(changes.values())) == len(changes)


def test_a_fingerprint_is_not_of_what_decides_no_answer() -> None:
    plain = _fingerprint()
    assert _fingerprint(lambda net: net.last.weight.data.fill_(1)) == plain  # behind the cut
    assert _fingerprint(lambda net: net.to(memory_format=torch.channels_last)) == plain
    assert _fingerprint(lambda net: net.requires_grad_(False).eval()) == plain
