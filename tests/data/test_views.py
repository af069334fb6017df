"""Views are pure functions of (seed, index, view), in any process and after anything."""

from __future__ import annotations

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from tltrain.core.errors import UserError
from tltrain.core.recipe import Augment
from tltrain.data import Split
from tltrain.data import views as module
from tltrain.data.sampler import SampleRef
from tltrain.data.sources.image_list import FileReader
from tltrain.data.views import Preprocess, Views

LEVELS: list[Augment] = [*get_args(Augment)]


@pytest.fixture
def split(tmp_path: Path) -> Split:
    paths = []
    for i in range(6):
        pixels_HWC = np.random.default_rng(i).integers(0, 256, (40 + 7 * i, 60, 3), dtype=np.uint8)
        paths.append(str(tmp_path / f"{i}.png"))
        Image.fromarray(pixels_HWC).resize((300, 200 + 35 * i)).save(paths[-1])
    return Split("train", np.arange(6), tuple(paths), np.arange(6) * 3, FileReader(tuple(paths)))


def _views(split: Split, augment: Augment = "strong", flip: bool = True, seed: int = 0) -> Views:
    return Views(split, Preprocess(32, 36), augment, flip, seed)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_evaluation_view_is_torchvisions(split: Split, interpolation: str) -> None:
    preprocess = Preprocess(32, 36, interpolation)  # type: ignore[arg-type]
    views = Views(split, preprocess, "strong", True, 0)
    expected = v2.Compose([v2.Resize(36, v2.InterpolationMode(interpolation)), v2.CenterCrop(32), v2.PILToTensor()])
    for i in range(6):
        assert min(views.base(i).shape[1:]) == 36
        assert views.base(i).dtype == torch.uint8
        assert torch.equal(views.view(i, 0), expected(split.read(i)))


@pytest.mark.parametrize("augment", LEVELS)
def test_a_view_depends_on_nothing_that_happened(split: Split, augment: Augment) -> None:
    views = _views(split, augment)
    wanted = [(i, v) for i in range(6) for v in range(4)]
    first = {w: views.view(*w) for w in wanted}
    torch.manual_seed(99)
    other = _views(split, augment)
    for w in reversed(wanted):
        torch.rand(3)
        assert torch.equal(other.view(*w), first[w])
        assert first[w].shape == (3, 32, 32)


@pytest.mark.parametrize("augment", LEVELS)
def test_an_erased_view_depends_on_nothing_that_happened_either(split: Split, augment: Augment) -> None:
    """It is the view without erasing, but for one rectangle of one colour; view 0 is whole."""
    plain, views, other = (Views(split, Preprocess(32, 36), augment, True, 0, erase=erase) for erase in (0.0, 0.5, 0.5))
    num_erased = 0
    for i in range(6):
        assert torch.equal(views.view(i, 0), plain.view(i, 0))
        for v in reversed(range(1, 5)):
            view = views.view(i, v)
            torch.rand(3)
            assert torch.equal(other.view(i, v), view)
            where = (view != plain.view(i, v)).any(0)
            num_erased += bool(where.any())
            assert len(view[:, where].unique(dim=1).T) <= 1
    assert 4 < num_erased < 20


def test_a_view_leaves_torchs_generator_alone(split: Split) -> None:
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    _views(split).view(0, 3)
    assert torch.equal(torch.rand(2), expected)


def test_a_view_does_not_depend_on_the_number_of_threads(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 500, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    split = Split("train", np.zeros(1, np.int64), ("a",), np.zeros(1, np.int64), FileReader((str(tmp_path / "a.png"),)))
    before = torch.get_num_threads()
    try:
        seen = []
        for threads in (1, 4):
            torch.set_num_threads(threads)
            views = Views(split, Preprocess(300, 320), "strong", True, 0)
            seen.append(torch.stack([views.view(0, v) for v in range(6)]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*seen)


def test_views_seeds_and_samples_differ(split: Split) -> None:
    for augment in LEVELS[1:]:
        views, reseeded = _views(split, augment), _views(split, augment, seed=1)
        assert len({views.view(0, v).numpy().tobytes() for v in range(6)}) > 4
        assert any(not torch.equal(views.view(0, v), reseeded.view(0, v)) for v in range(1, 4))
    assert all(torch.equal(_views(split, "none").view(2, v), _views(split, "none").view(2, 0)) for v in range(4))


def test_the_number_in_the_source_seeds_the_view(split: Split) -> None:
    moved = Split("train", split.labels[::-1], split.ids[::-1], split.source_index[::-1], FileReader(split.read.paths[::-1]))  # type: ignore[attr-defined]
    assert torch.equal(_views(moved).view(0, 2), _views(split).view(5, 2))


def test_flip_can_be_switched_off(tmp_path: Path) -> None:
    ramp_HWC = np.repeat(np.linspace(0, 255, 32).astype(np.uint8)[None, :, None], 32, 0).repeat(3, 2)
    Image.fromarray(ramp_HWC).save(tmp_path / "a.png")
    split = Split("train", np.zeros(1, np.int64), ("a",), np.zeros(1, np.int64), FileReader((str(tmp_path / "a.png"),)))
    for augment in ("light", "strong"):
        rises = {
            flip: [bool(v[0, 16, 20] > v[0, 16, 10]) for k in range(1, 30) if (v := views.view(0, k)) is not None]
            for flip in (False, True)
            for views in [Views(split, Preprocess(32, 32), augment, flip, 0)]
        }
        assert all(rises[False])
        assert {True, False} == set(rises[True])


@pytest.mark.parametrize("resize", [32, 35])
def test_a_light_view_is_a_crop_of_the_base_with_an_eighth_of_black_around_it(resize: int) -> None:
    """Every place of the crop occurs, and no other."""
    row_HW, column_HW = np.mgrid[1 : resize + 1, 1 : resize + 1].astype(np.uint8)
    image = Image.fromarray(np.stack([row_HW, column_HW, np.full_like(row_HW, 255)], 2))  # no two pixels are equal, and none is black
    split = Split("train", np.zeros(1, np.int64), ("a",), np.zeros(1, np.int64), lambda position: image)
    views = Views(split, Preprocess(32, resize), "light", False, 0)
    side = resize + 2 * (32 // 8)
    padded_CHW = torch.zeros((3, side, side), dtype=torch.uint8)
    padded_CHW[:, 4 : 4 + resize, 4 : 4 + resize] = views.base(0)
    places = set()
    for v in range(1, 200):
        view_CHW = views.view(0, v)
        at = [(y, x) for y in range(side - 31) for x in range(side - 31) if torch.equal(padded_CHW[:, y : y + 32, x : x + 32], view_CHW)]
        assert len(at) == 1, f"view {v}"
        places.add(at[0])
    assert [{place[axis] for place in places} for axis in (0, 1)] == [set(range(side - 31))] * 2


def test_an_item_becomes_tensors(split: Split) -> None:
    views = _views(split)
    plain = views[SampleRef(2, 1)]
    assert set(plain) == {"image", "label", "weight", "position", "view"}
    assert (plain["label"].dtype, plain["weight"].dtype, plain["position"].dtype) == (torch.int64, torch.float32, torch.int64)
    assert (plain["position"].item(), plain["view"].item()) == (2, 1)
    apply_mixup = views[SampleRef(2, 1, 0.0, 4, 3, 0.25, (1, 2, 3, 4))]
    assert torch.equal(apply_mixup["partner_image"], views.view(4, 3))
    assert apply_mixup["partner_label"].item() == 4
    assert apply_mixup["lam"].item() == 0.25
    assert apply_mixup["box"].tolist() == [1, 2, 3, 4]
    assert apply_mixup["weight"].item() == 0
    assert views[SampleRef(2, 1, partner=0)]["box"].tolist() == [0, 0, 0, 0]


def test_bases_are_read_once_and_not_pickled(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    views = _views(split)
    size = len(pickle.dumps(views))
    first = views.view(1, 2)
    for path in split.ids[:3]:
        Path(path).unlink()
    assert torch.equal(views.view(1, 2), first)  # out of memory
    assert abs(len(pickle.dumps(views)) - size) < 20
    monkeypatch.setattr(module, "MEMORY_BYTES", 0)
    none_kept = pickle.loads(pickle.dumps(views))
    none_kept.view(5, 1)
    assert none_kept._cached == {}


def test_a_crop_larger_than_the_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"resize is 30 and data\.size 32"):
        Preprocess(32, 30)


def test_a_view_is_its_own_memory(split: Split) -> None:
    views = _views(split, "none")
    views.view(0, 0).zero_()
    views.base(0).zero_()
    assert views.view(0, 0).any()
    torch.save(views.view(0, 0), buffer := io.BytesIO())
    assert buffer.tell() < 3 * 32 * 32 + 2000


def test_threads_that_make_views_side_by_side_get_their_own(split: Split) -> None:
    """The generator that is seeded for a view is the process's: `predict --views` makes the views of several images at a time."""
    refs = [(i, v) for v in range(1, 60) for i in range(6)]

    def view(ref: tuple[int, int]) -> torch.Tensor:
        return _views(split, "light").view(*ref)

    alone = [view(ref) for ref in refs]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(view, refs))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
