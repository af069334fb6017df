"""Files of weights that would run code, are no weights, or are damaged: none runs, each gets one message."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import os
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from backbone_files import config as vit_config
from backbone_files import load, ours
from torch import Tensor, nn

from tltrain.core.errors import UserError

CODE = r"to load them, torch would have to call {}\. A file that may call what it names can run any code.*convert it: python -c"
MICRO = "resnet-micro"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    return dict(ours(tmp_path_factory.mktemp("ours") / "w.safetensors", MICRO).chain.net.state_dict())


class Evil:
    """When it is unpickled it makes a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.mark}'",)


@pytest.mark.parametrize("form", ["zip", "old", "pickle", "pickle 0", "beside a state dict"])
@pytest.mark.parametrize("file", ["w.pth", "w.safetensors", "w.ckpt", "w"])
def test_no_code_is_run(tmp_path: Path, state: dict[str, Tensor], form: str, file: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # which the user may have set for another program
    mark, path = tmp_path / "it ran", tmp_path / file
    content = {"state_dict": state, "x": Evil(mark)} if form == "beside a state dict" else {"x": Evil(mark)}
    if form.startswith("pickle"):
        path.write_bytes(pickle.dumps(content, protocol=0 if form.endswith("0") else 4))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form != "old")
    with pytest.raises(UserError):
        load(MICRO, path)
    assert not mark.exists()
    if not form.startswith("pickle"):
        with pytest.raises(UserError, match=CODE.format(r"posix\.system")):
            load(MICRO, path)
        with path.open("rb") as opened:
            torch.load(opened, weights_only=False)
        assert mark.exists(), "else the file would not have been able to"


@pytest.mark.parametrize(
    ("extra", "named"),
    [
        (argparse.Namespace(lr=1), r"argparse\.Namespace"),
        (np.float64(0.5), r"numpy\.\w*core\.multiarray\.scalar"),
        (Path("x"), r"pathlib\.[\w.]+"),
        (nn.Linear(2, 2), r"torch\.nn\.modules\.linear\.Linear"),
    ],
    ids=["Namespace", "numpy scalar", "Path", "module"],
)
def test_what_needs_more_than_tensors_is_named(tmp_path: Path, state: dict[str, Tensor], extra: object, named: str) -> None:
    torch.save({"state_dict": state, "best": extra}, tmp_path / "w.pth.tar")
    with pytest.raises(UserError, match=CODE.format(named)):
        load(MICRO, tmp_path / "w.pth.tar")


def test_the_conversion_that_is_advised_works(tmp_path: Path, state: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": state, "args": argparse.Namespace()}, "FILE")
    with pytest.raises(UserError) as caught:
        load(MICRO, "FILE")
    line = str(caught.value).partition("python -c ")[2]
    code = line[line.index('"') + 1 : line.rindex('"')]
    exec(compile(code, "advice", "exec"), {})
    assert load(MICRO, "weights.pth").origin.startswith("weights.pth; the file says nothing of itself")


def _zip(*names: str) -> bytes:
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return held.getvalue()


def _tar() -> bytes:
    held = io.BytesIO()
    with tarfile.open(fileobj=held, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("pickle"))
    return held.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n", "a pointer of Git LFS.*git lfs pull"),
        (b"<!DOCTYPE html><html>404", "a web page"),
        (b"\n  <html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n" + bytes(600), "an HDF5 file, such as Keras writes"),
        (b"GGUF" + bytes(600), "a GGUF file"),
        (gzip.compress(b"x"), "compressed with gzip"),
        (_tar(), "a tar archive"),
        (b"Not found.\n", "a text file"),
        (_zip("w/data.pkl", "w/constants.pkl", "w/code/x.py"), "a TorchScript program"),
        (_zip("m/archive_format", "m/data/weights/x"), r"a program of torch\.export"),
        (_zip("a.npy"), "an archive of NumPy arrays"),
        (_zip("folder/w.pth"), r"a zip archive that holds folder/w\.pth"),
        (_zip("x.txt"), "a zip archive, and none of torch's"),
        (_zip("w/data.pkl"), "may be damaged|no file that torch.save wrote|damaged or cut off"),
        (b"\x80\x02" + bytes(range(256)) * 8, "no file that torch.save wrote, or is damaged"),
        (bytes(range(1, 256)) * 8, "no file that torch.save wrote, or is damaged|damaged or cut off"),
        (b"\x10\0\0\0\0\0\0\0{bad", "named .safetensors|damaged|cannot be read as safetensors"),
    ],
)
@pytest.mark.parametrize("file", ["w.pth", "w.safetensors"])
def test_what_is_no_weights_is_said(tmp_path: Path, content: bytes, message: str, file: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=message if file == "w.pth" else f"{message}|named .safetensors, and cannot be read"):
        load(MICRO, tmp_path / file)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("old", [False, True])
def test_a_file_that_is_cut_off_is_said_to_be_damaged(tmp_path: Path, state: dict[str, Tensor], share: float, old: bool) -> None:
    path = tmp_path / "w.pth"
    torch.save(state, path, _use_new_zipfile_serialization=not old)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(UserError, match="damaged") as refused:
        load(MICRO, path)
    assert "If you are seeing this error" not in str(refused.value)  # torch's advice, which would be cut in its middle


def test_one_flipped_bit_is_found(tmp_path: Path, state: dict[str, Tensor]) -> None:
    path = tmp_path / "w.pth"
    torch.save(state, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"are damaged: the checksum of .* in it does not match"):
        load(MICRO, path)


def test_a_small_file_cannot_unpack_to_a_large_one(tmp_path: Path, state: dict[str, Tensor]) -> None:
    torch.save(state, tmp_path / "w.pth")
    with zipfile.ZipFile(tmp_path / "w.pth") as whole, zipfile.ZipFile(tmp_path / "z.pth", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in whole.namelist():
            packed.writestr(name, whole.read(name))
    with pytest.raises(UserError, match="compressed in a way that torch never does"):
        load(MICRO, tmp_path / "z.pth")
    torch.save({**state, "conv1.weight": torch.ones(1).expand(10**6, 10**6)}, tmp_path / "huge.pth")
    assert (tmp_path / "huge.pth").stat().st_size < 3_000_000
    with pytest.raises(UserError, match=r"conv1\.weight is \(1000000, 1000000\), not"):
        load(MICRO, tmp_path / "huge.pth")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.eye(3).to_sparse(), "is quantised, sparse or of a special kind"),
        (torch.ones(3, dtype=torch.complex64), "is complex"),
        (torch.ones(3, device="meta"), "is without values"),
    ],
)
def test_tensors_of_other_kinds_are_refused_by_name(tmp_path: Path, state: dict[str, Tensor], value: Tensor, message: str) -> None:
    torch.save({**state, "conv1.weight": value}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"'conv1\.weight' {message}"):
        load(MICRO, tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(3), "hold one tensor, not tensors by name"),
        ([1, 2], "hold a list"),
        ({}, "there is nothing in it"),
        ({"epoch": 1}, "there is only 'epoch'"),
        ({"a": {"b": {"c": {"d": {"weight": torch.ones(3)}}}}}, "there is only 'a'"),
        ({1: torch.ones(3)}, "hold no tensors by name"),
    ],
)
def test_content_without_tensors_by_name_is_refused(tmp_path: Path, content: object, message: str) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=message):
        load(MICRO, tmp_path / "w.pth")


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [_pipe, _dangling, _loop])
def test_what_is_neither_a_file_nor_a_folder_is_said(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"neither a file nor a folder, or a link to what is not there|cannot be read"):
        load(MICRO, tmp_path / "w.pth")


def test_a_path_that_is_too_long_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot be read: File name too long|no such file"):
        load(MICRO, "a" * 5000)


@pytest.mark.parametrize("kind", ["vit", "resnet", "timm"])
def test_a_folder_of_another_library_runs_no_code_either(tmp_path: Path, kind: str) -> None:
    configs: dict[str, dict[str, Any]] = {
        "vit": vit_config().to_dict(),
        "resnet": {"model_type": "resnet", "depths": [3, 4, 6, 3], "hidden_sizes": [256, 512, 1024, 2048]},
        "timm": {"architecture": "test_vit", "num_classes": 3},
    }
    (tmp_path / "config.json").write_text(json.dumps(configs[kind]))
    torch.save({"x": Evil(tmp_path / "it ran")}, tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=CODE.format(r"posix\.system")):
        load(None, tmp_path)
    assert not (tmp_path / "it ran").exists()
