"""Strong views made on the device are those that Pillow makes, bit for bit; a run does not depend on where they are made."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ALL, HEAD
from gpu_device import DEVICES, DEVICES_SLOW, running_on
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images
from torchvision.transforms import v2

from tltrain.cache.cost_model import Budget
from tltrain.cache.measure import Machine
from tltrain.cache.planner import Choices, store_root
from tltrain.core import stage_plan
from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.core.recipe import Recipe
from tltrain.data import Split, open_images, rendering
from tltrain.data import views as views_module
from tltrain.data.rendering import DRAWN, PIXELS, to_device
from tltrain.data.sampler import SampleRef, derive_seed
from tltrain.data.views import Preprocess, Views
from tltrain.models import factory
from tltrain.planning import view_device
from tltrain.planning.view_device import Rates, ViewDevice
from tltrain.training.run import train

Made = Callable[..., Recipe]
SMALL, NET = Preprocess(40, 44), Preprocess(224, 256)
VIEWS = [
    pytest.param(SMALL, id="small"),
    pytest.param(Preprocess(40, 40, "bicubic"), id="bicubic"),
    pytest.param(NET, id="net"),
    pytest.param(Preprocess(33, 90, "bicubic"), id="shrunk"),
]
STRONG = ALL | {"name": "strong", "augment": "strong", "steps": 4}


@pytest.fixture(scope="module")
def split() -> Split:
    """Photos lying and upright, and noise, in which no error hides: squares, and strips so long that Pillow shrinks them along y first."""
    photos = [Image.fromarray(pixels) for pixels in load_sample_images().images]
    draw, sizes = np.random.default_rng(0), [(300, 300), (80, 700), (700, 80), (130, 310)]
    noise = [Image.fromarray(draw.integers(0, 256, (height, width, 3), dtype=np.uint8)) for width, height in sizes]
    return _split([*photos, *(photo.rotate(90, expand=True) for photo in photos), *noise])


def _split(images: Sequence[Image.Image]) -> Split:
    n = len(images)
    return Split("train", np.zeros(n, np.int64), tuple(str(i) for i in range(n)), np.arange(n) * 3, lambda i: images[i])


def _both(split: Split, preprocess: Preprocess, flip: bool = True, erasing: float = 0.0) -> tuple[Views, Views]:
    host, device = (Views(split, preprocess, "strong", flip, 5, on_device=on, erase=erasing) for on in (False, True))
    return host, device


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("preprocess", VIEWS)
def test_the_device_makes_pillows_pixels(preprocess: Preprocess, device: str, split: Split) -> None:
    """View 0 among them, which is the plain centre; more at once than are made together."""
    host, on_device = _both(split, preprocess)
    num = rendering._CHUNK + 9 if preprocess is SMALL or device == "cuda" else 16
    items = [SampleRef(n % len(split), n // len(split)) for n in range(num)]
    batch = on_device.batch(items)
    assert "image" not in batch
    made = to_device(batch, torch.device(device))
    assert made["image"].device.type == device
    expected = host.batch(items)
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(made[name].cpu(), tensor), name
        assert made[name].stride() == tensor.stride(), name  # another layout would run other kernels


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("flip", [True, False])
def test_the_device_fills_and_erases_as_the_host_does(flip: bool, device: str, split: Split) -> None:
    """Without flips corners are filled by the edge. Some views of the batch have a rectangle, and some have none."""
    host, on_device = _both(split, SMALL, flip, 0.5)
    items = [SampleRef(n % len(split), n // len(split)) for n in range(4 * len(split))]
    made, expected = (views.batch(items) for views in (on_device, host))
    assert torch.equal(to_device(made, torch.device(device))["image"].cpu(), expected["image"])
    erased = made["image" + DRAWN][:, rendering._COLUMN["erased_bottom"]] > 0
    assert 0 < erased.sum() < len(items) - len(split)
    plain = _both(split, SMALL, flip)[0].batch(items)["image"]
    assert [torch.equal(*pair) for pair in zip(plain, expected["image"], strict=True)] == (~erased).tolist()


def test_both_orders_of_pillow_occur(split: Split) -> None:
    """So that the test above sees it when one of them is wrong."""
    _, on_device = _both(split, SMALL)
    tall = on_device.batch([SampleRef(i, 1) for i in range(len(split))])["image" + DRAWN][:, rendering._COLUMN["tall"]]
    assert bool(tall.any()) == rendering.tall_from_above()
    assert not tall.all()


@pytest.mark.parametrize("device", DEVICES)
def test_a_view_does_not_depend_on_its_neighbours(device: str, split: Split) -> None:
    _, views = _both(split, SMALL)
    where = torch.device(device)
    together = to_device(views.batch([SampleRef(i, 3) for i in range(len(split))]), where)["image"]
    again = to_device(views.batch([SampleRef(i, 3) for i in reversed(range(len(split)))] * 9), where)["image"]
    for i in range(len(split)):
        alone = to_device(views.batch([SampleRef(i, 3)]), where)["image"]
        assert torch.equal(alone[0], together[i])
        assert torch.equal(alone[0], again[-1 - i])


@pytest.mark.parametrize("device", DEVICES)
def test_the_host_does_not_wait_for_the_device(device: str, split: Split) -> None:
    _, views = _both(split, SMALL)
    batch = views.batch([SampleRef(i, 2) for i in range(len(split))])
    expected = to_device(batch, torch.device("cpu"))["image"]
    torch.use_deterministic_algorithms(True)
    try:
        if device == "cuda":
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
            torch.cuda.set_sync_debug_mode("error")
        made = to_device(batch, torch.device(device))["image"]
    finally:
        torch.use_deterministic_algorithms(False)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(made.cpu(), expected)


@pytest.mark.parametrize("flip", [True, False])
def test_a_strong_view_is_torchvisions_under_its_own_seed(flip: bool, split: Split) -> None:
    """The recipe of these views, written down once more: what a turn leaves open is in the padding."""
    transform = v2.Compose([
        v2.RandomResizedCrop(40, scale=(0.8, 1.0)),
        *([v2.RandomHorizontalFlip()] if flip else []),
        v2.Pad(8, padding_mode="reflect" if flip else "edge"),
        v2.RandomRotation(10, interpolation=v2.InterpolationMode.BILINEAR),
        v2.CenterCrop(40),
        v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
        v2.PILToTensor(),
    ])  # fmt: skip
    host, on_device = _both(split, SMALL, flip)
    for i, v in [(0, 1), (3, 2), (5, 7)]:
        base = Image.fromarray(host.base(i).permute(1, 2, 0).numpy())
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(5, "view", 3 * i, v))
            expected = transform(base)
        off = (host.view(i, v).int() - expected.int()).abs()  # another padding moves the origin, and with it the last bit of a float
        assert off.max() <= 2
        assert (off > 0).float().mean() < 0.01
        assert torch.equal(on_device[SampleRef(i, v)]["image"], host.view(i, v))


def test_mixed_partners_are_made_too_and_torchs_generator_is_left_alone(split: Split) -> None:
    host, on_device = _both(split, SMALL)
    items = [SampleRef(0, 1, 1.0, 3, 2, 0.25, (1, 2, 3, 4)), SampleRef(4, 5, 1.0, 1, 0, 0.5)]
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    batch = on_device.batch(items)
    assert torch.equal(torch.rand(2), expected)
    assert {"image" + PIXELS, "image" + DRAWN, "partner_image" + PIXELS, "partner_image" + DRAWN} < batch.keys()
    made, wanted = to_device(batch, torch.device("cpu")), host.batch(items)
    assert made.keys() == wanted.keys()
    assert all(torch.equal(made[name], wanted[name]) for name in wanted)


def test_other_views_stay_with_the_host(split: Split) -> None:
    for augment in ("none", "light", "trivial", "rand"):
        views = Views(split, SMALL, augment, True, 0, on_device=True)
        assert "image" in views.batch([SampleRef(0, 1)])


@pytest.mark.parametrize("device", DEVICES_SLOW)
def test_a_run_does_not_depend_on_where_its_views_are_made(device: str, made_recipe: Made, tmp_path: Path) -> None:
    recipe = made_recipe(stages=[HEAD | {"steps": 3}, STRONG | {"mixup": 0.4}], data={"eval_limit": 16})
    weights = {}
    for views, workers in (("host", 0), ("device", 1)):
        with running_on(device):
            assert train(recipe, RunFlags(folder=tmp_path / views, workers=workers, views=views))["outcome"] == "finished"  # type: ignore[arg-type]
        weights[views] = load_file(tmp_path / views / "weights.safetensors")
        assert ("made on the device" in (tmp_path / views / "plan.txt").read_text()) == (views == "device")
    for name, tensor in weights["host"].items():
        assert torch.equal(weights["device"][name], tensor), name


def test_a_store_filled_from_either_serves_both(made_recipe: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is computed twice, and the rows that stand are those that are looked up."""
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    recipe = made_recipe(stages=[HEAD | {"augment": "strong", "views": 2, "steps": 20}], data={"eval_limit": 16})
    for views in ("device", "host"):
        start = RunFlags(folder=tmp_path / views, workers=0, views=views, cache="always")
        assert train(recipe, start)["outcome"] == "finished"
    one, other = (load_file(tmp_path / views / "weights.safetensors") for views in ("device", "host"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(list(store_root().glob("features-*"))) == 2  # train's and val's


def _decided(recipe: Recipe, start: RunFlags, device: str) -> ViewDevice:
    images = open_images(recipe.data)
    student = factory.skeleton(recipe.backbone, len(images.classes), 32, 36)
    planned = stage_plan.plan(recipe, student.chain, len(images.train), True)
    machine = Machine(torch.device(device), "no", contextlib.nullcontext, 2, 1)
    return view_device.view_device(recipe, start, images.train, student, planned, machine, Choices((), None, Budget(0, 0, 0)))


@pytest.mark.parametrize("device", DEVICES)
def test_the_plan_measures_and_says_which(device: str, made_recipe: Made) -> None:
    recipe = made_recipe(stages=[STRONG])
    found = _decided(recipe, RunFlags(), device)
    if device == "cpu":
        assert found == ViewDevice()  # the processor that would make them is the workers' own
    else:
        assert found.why.startswith("on the device: 2 workers can make" if found.on_device else "on the host: 2 workers can make")
    assert _decided(recipe, RunFlags(views="device"), device).on_device
    assert not _decided(recipe, RunFlags(views="host"), device).on_device
    assert _decided(made_recipe(stages=[ALL | {"augment": "light"}]), RunFlags(views="device"), device) == ViewDevice()


@pytest.mark.parametrize("device", DEVICES)
def test_a_device_that_makes_other_pixels_is_refused(device: str, made_recipe: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = made_recipe(stages=[STRONG])
    made = rendering.pack
    monkeypatch.setattr(
        views_module, "pack", lambda boxes, drawn, *rest: made(boxes, [replace(d, angle=d.angle + 1) for d in drawn], *rest)
    )
    with pytest.raises(UserError, match=r"--views device, and here the device makes other pixels than Pillow, by up to \d+ grey levels"):
        _decided(recipe, RunFlags(views="device"), device)
    if device == "cuda":
        found = _decided(recipe, RunFlags(), device)
        assert not found.on_device
        assert "other pixels than Pillow" in found.why


def test_the_device_takes_over_where_the_workers_are_behind_the_network() -> None:
    behind = Rates(host_s=1 / 2000, base_s=1 / 20000, render_s=1 / 15000, network_s=1 / 6000)
    assert behind.pays
    assert not Rates(1 / 8000, 1 / 20000, 1 / 15000, 1 / 6000).pays  # the workers keep up
    assert not Rates(1 / 2000, 1 / 1980, 1 / 15000, 1 / 6000).pays  # reading is the limit, and stays it
    assert not Rates(1 / 5900, 1 / 20000, 1 / 15000, 1 / 6000).pays  # what the device would take costs more than it spares
    said = "8 workers can make 2,000 images/s, or hand over 20,000 for the device to make 15,000; training takes about 6,000"
    assert behind.line(8) == said
