"""The data set of real pictures is made of a Debian package: its eight classes, each file once."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import pytest

from benchmarks import pictures

FILES = {
    "animals/birds/duck.png": b"duck",
    "animals/fish/duck.png": b"another duck",
    "animals/duck-again.png": b"duck",
    "food/apple.png": b"an apple, whose length is odd",
    "food/apple.svg": b"<svg/>",
    "symbols/plus.png": b"+",
}


def _member(name: str, content: bytes) -> bytes:
    return f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode() + content + b"\n" * (len(content) % 2)


def _package(path: Path) -> Path:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in FILES.items():
            entry = tarfile.TarInfo(f"./{pictures.STAMPS}{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", "data.tar.xz": data.getvalue()}
    path.write_bytes(b"!<arch>\n" + b"".join(_member(name, content) for name, content in members.items()))
    return path


def test_a_package_becomes_a_folder_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pictures.main([str(_package(tmp_path / "stamps.deb")), str(tmp_path / "pictures")])
    made = {str(path.relative_to(tmp_path / "pictures")): path.read_bytes() for path in (tmp_path / "pictures").rglob("*.*")}
    assert made == {
        "animals/birds-duck.png": b"duck",  # of two equal files the first by path
        "animals/fish-duck.png": b"another duck",
        "food/apple.png": FILES["food/apple.png"],
    }
    assert "= 3 pictures" in capsys.readouterr().out


def test_the_folder_of_an_installed_package_gives_the_same(tmp_path: Path) -> None:
    for name, content in FILES.items():
        path = tmp_path / "stamps" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    found = list(pictures.pictures(tmp_path / "stamps"))
    assert found == list(pictures.pictures(_package(tmp_path / "stamps.deb")))


def test_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.deb").write_bytes(b"PK")
    with pytest.raises(ValueError, match="no Debian package"):
        list(pictures.pictures(tmp_path / "x.deb"))
