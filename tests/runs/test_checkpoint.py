"""A checkpoint is whole, or it is seen to be damaged, named, set aside and stepped over."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import trials, world
from benchmarks.flips import two_checkpoints
from benchmarks.trials import References
from benchmarks.world import Trial
from tltrain.core import files
from tltrain.core.errors import UserError
from tltrain.runs import checkpoint
from tltrain.runs.checkpoint import Best, Progress, Saver, State


@pytest.fixture(scope="module")
def two(references: References, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two checkpoints of a run in its middle, every kind of file in each: best weights and optimizer state too."""
    return two_checkpoints(references(1), tmp_path_factory.mktemp("two"))


def test_every_flipped_bit_and_every_cut_is_seen_and_stepped_over(two: Path) -> None:
    assert {path.name for path in checkpoint.committed(two)[0].iterdir()} == {
        "best.safetensors", "manifest.json", "optimizer.pt", "progress.json", "weights.safetensors",
    }  # fmt: skip
    print(f"TLTRAIN_SEED={trials.seed()}")
    draw = trials.damages(checkpoint.committed(two)[0], 150, 40, trials.seed())
    assert [problem for damage in draw for problem in trials.overlooked(two, damage)] == []


def test_no_bit_of_the_manifest_can_flip_unseen(two: Path, tmp_path: Path) -> None:
    """Its own checksum is all that protects it: every bit of it, and every length."""
    path = tmp_path / "copy"
    shutil.copytree(checkpoint.committed(two)[0], path)
    manifest, unseen = path / checkpoint.MANIFEST, []
    whole = manifest.read_bytes()
    assert checkpoint.verify(path) is None
    for bit in range(8 * len(whole)):
        spoilt = bytearray(whole)
        spoilt[bit // 8] ^= 1 << bit % 8
        manifest.write_bytes(spoilt)
        if checkpoint.verify(path) is None:
            unseen.append(bit)
    for length in range(len(whole)):
        manifest.write_bytes(whole[:length])
        if checkpoint.verify(path) is None:
            unseen.append(-length)
    assert unseen == []


def _drop_manifest(path: Path) -> None:
    (path / checkpoint.MANIFEST).unlink()


def _drop_file(path: Path) -> None:
    (path / "optimizer.pt").unlink()


def _add_file(path: Path) -> None:
    (path / "weights.bin").write_bytes(b"x")


def _empty(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def _manifest_is_a_list(path: Path) -> None:
    (path / checkpoint.MANIFEST).write_text("[]")


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (_drop_manifest, "manifest.json cannot be read: FileNotFoundError"),
        (_drop_file, "files ['optimizer.pt'] are missing or too many"),
        (_add_file, "files ['weights.bin'] are missing or too many"),
        (_empty, "manifest.json cannot be read: FileNotFoundError"),
        (_manifest_is_a_list, "manifest.json cannot be read: TypeError"),
    ],
)
def test_an_incomplete_checkpoint_is_named_and_stepped_over(spoil: Callable[[Path], None], problem: str, two: Path, tmp_path: Path) -> None:
    folder, said = tmp_path / "checkpoints", list[str]()
    shutil.copytree(two, folder)
    newest, older = checkpoint.committed(folder)
    spoil(newest)
    assert checkpoint.newest(folder, said.append) == older
    assert len(said) == 1
    assert problem in said[0]
    assert f"checkpoint {newest.name} is damaged" in said[0]
    assert (folder / f"damaged-{newest.name}").is_dir()
    assert checkpoint.committed(folder) == [older]


def test_half_written_and_half_deleted_folders_are_ignored(two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    shutil.copytree(two, folder)
    newest = checkpoint.committed(folder)[0]
    shutil.copytree(newest, folder / f".{newest.name.replace('000001', '000002')}.tmp")
    newest.rename(folder / f".{newest.name}.123.old")
    assert [path.name for path in checkpoint.committed(folder)] == [p.name for p in checkpoint.committed(two)[1:]]
    assert checkpoint.newest(folder, pytest.fail) == checkpoint.committed(folder)[0]


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path / "none", pytest.fail) is None
    assert checkpoint.newest(tmp_path, pytest.fail) is None


def test_a_run_whose_newest_checkpoints_are_damaged_goes_on_from_an_older_one(references: References, tmp_path: Path) -> None:
    """It trains the lost steps again, and ends equal."""
    trial = Trial(trials.recipe(), str(tmp_path / "run"), start=trials.EVERY_STEP)
    assert world.run(replace(trial, before="signal_after", arguments=(7,))) == [75]
    newest = checkpoint.committed(tmp_path / "run" / "checkpoints")[:3]
    for path, file in zip(newest, ("progress.json", "optimizer.pt", "weights.safetensors"), strict=True):
        content = bytearray((path / file).read_bytes())
        content[len(content) // 2] ^= 4
        (path / file).write_bytes(content)
    run = world.finish(trial)
    assert trials.differences(run, references(1)) == []
    assert {path.name for path in (run / "checkpoints").glob("damaged-*")} == {f"damaged-{path.name}" for path in newest}
    assert all(f"checkpoint {path.name} is damaged" in world.log(trial) for path in newest)


def test_a_run_whose_every_checkpoint_is_damaged_starts_anew(references: References, tmp_path: Path) -> None:
    trial = Trial(trials.recipe(), str(tmp_path / "run"), start=trials.EVERY_STEP)
    assert world.run(replace(trial, before="signal_after", arguments=(3,))) == [75]
    for path in checkpoint.committed(tmp_path / "run" / "checkpoints"):
        (path / checkpoint.MANIFEST).unlink()
    assert trials.differences(world.finish(trial), references(1)) == []


def made_state(step: int, best: bool = False) -> State:
    weights = {"w": torch.arange(4.0) + step}
    return State(
        Progress(1, step, True, Best(0.5, 0, 2), 1, (0.1, 0.2), 3.0),
        weights,
        {"w": torch.ones(4)} if best else None,
        {"w": {"exp_avg": torch.full((4,), float(step)), "step": torch.tensor(float(step))}},
        {"scale": 65536.0},
    )


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    state = made_state(3, best=True)
    path = checkpoint.save(tmp_path, state, 7, keep=2)
    assert path.name == "000007-01-00000003-1"
    loaded = checkpoint.load(path)
    assert loaded.progress == state.progress
    assert torch.equal(loaded.weights["w"], state.weights["w"])
    assert loaded.best is not None
    assert torch.equal(loaded.best["w"], torch.ones(4))
    assert loaded.optimizer is not None
    assert torch.equal(loaded.optimizer["w"]["exp_avg"], torch.full((4,), 3.0))
    assert loaded.extra == {"scale": 65536.0}


def test_older_ones_go_only_after_the_new_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, made_state(step), 1, keep=2)
    with monkeypatch.context() as patch:
        patch.setattr(files, "commit_folder", _no_space)
        with pytest.raises(UserError, match=r"could not be written .*No space left.*older checkpoints are untouched"):
            checkpoint.save(tmp_path, made_state(3), 1, keep=2)
    assert [path.name[-10:] for path in checkpoint.committed(tmp_path)] == ["00000002-1", "00000001-1"]
    checkpoint.save(tmp_path, made_state(3), 1, keep=2)
    assert [path.name[-10:] for path in checkpoint.committed(tmp_path)] == ["00000003-1", "00000002-1"]
    assert all(checkpoint.verify(path) is None for path in checkpoint.committed(tmp_path))
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def _no_space(temporary: Path, final: Path) -> None:
    raise OSError(28, os.strerror(28))


def test_the_newest_position_counts_and_of_equal_ones_the_later_start(tmp_path: Path) -> None:
    """A start that went on from an older checkpoint stands behind what an earlier start had reached, until it has come as far."""
    saved = [
        (1, 0, 9, False), (2, 0, 9, False), (1, 0, 9, True), (3, 0, 4, True),
        (2, 0, 10, False), (1, 1, 0, False), (1, 1, 2, True), (4, 0, 1, False),
    ]  # fmt: skip
    for generation, stage, step, evaluated in saved:
        progress = Progress(stage, step, evaluated)
        checkpoint.save(tmp_path, replace(made_state(step), progress=progress), generation, keep=100)
    assert [path.name for path in checkpoint.committed(tmp_path)] == [
        "000001-01-00000002-1", "000001-01-00000000-0", "000002-00-00000010-0", "000001-00-00000009-1",
        "000002-00-00000009-0", "000001-00-00000009-0", "000003-00-00000004-1", "000004-00-00000001-0",
    ]  # fmt: skip
    found = checkpoint.newest(tmp_path, pytest.fail)
    assert found is not None
    assert checkpoint.load(found).progress == Progress(1, 2, True)


def test_what_dead_starts_left_half_written_goes_with_the_next_save(tmp_path: Path) -> None:
    """Each kill in a save would otherwise cost the size of a checkpoint for ever."""
    for name in (".000001-00-00000003-0.tmp", ".000001-00-00000001-0.99999.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights.safetensors").write_bytes(b"half")
    checkpoint.save(tmp_path, made_state(4), 2, keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["000002-01-00000004-1"]


def test_nothing_in_a_checkpoint_can_run_code(tmp_path: Path) -> None:
    """A pickle that would call something is refused, even where its checksum is right."""
    path = checkpoint.save(tmp_path, made_state(1), 1, keep=1)
    torch.save({"optimizer": _Evil(tmp_path / "ran")}, path / "optimizer.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        checkpoint.load(path)
    assert not (tmp_path / "ran").exists()


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def test_the_background_writer_reports_what_it_met(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saver = Saver(tmp_path, 1, keep=2, may_write=lambda: True)
    saver.submit(made_state(1))
    saver.wait()
    assert not saver.failed()
    monkeypatch.setattr(files, "commit_folder", _no_space)
    saver.submit(made_state(2))
    with pytest.raises(UserError, match="No space left"):
        saver.wait()
    assert [path.name for path in checkpoint.committed(tmp_path)] == ["000001-01-00000001-1"]


def test_a_start_that_was_taken_over_writes_no_checkpoint(tmp_path: Path) -> None:
    saver = Saver(tmp_path, 1, keep=2, may_write=lambda: False)
    saver.submit(made_state(1))
    saver.wait()
    assert list(tmp_path.iterdir()) == []
