"""Another user's folders, a user without a home, and what new files let others do: a clear word with a remedy, and never a traceback."""

from __future__ import annotations

import os
import pwd
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli_words import mistake
from fake_run import fake_run
from other_user import another_user, readable_folder

from launcher.slurm import site
from tltrain.cli.main import main
from tltrain.core import paths
from tltrain.core.errors import UserError
from tltrain.models import torchvision_hub
from tltrain.runs import run_dir


@pytest.fixture
def theirs() -> Iterator[Path]:
    """A folder with a finished run of somebody else."""
    with readable_folder() as place:
        fake_run(place / "run", ["cat", "dog"], n=20)
        main(["compare", *2 * [str(place / "run")], "--out", str(place / "c.html")])  # loads what the other user may not read
        (place / "c.html").unlink()
        yield place


def test_a_report_of_anothers_run_goes_elsewhere(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with another_user(theirs):
        said = mistake(["report", str(theirs / "run")], capsys)
    assert f"{theirs / 'run' / 'report.html'} cannot be written: Permission denied; give another place with --out" in said


def test_out_is_where_the_report_goes(theirs: Path, tmp_path: Path) -> None:
    assert main(["report", str(theirs / "run"), "--out", str(tmp_path / "new" / "mine.html")]) == 0
    assert "<html" in (tmp_path / "new" / "mine.html").read_text()
    assert not (theirs / "run" / "report.html").exists()


def test_a_comparison_in_anothers_folder_is_refused(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with another_user(theirs):
        said = mistake(["compare", str(theirs / "run"), str(theirs / "run"), "--out", str(theirs / "c.html")], capsys)
    assert f"{theirs / 'c.html'} cannot be written: Permission denied; give another place with --out" in said


def test_weights_that_may_not_be_read_are_not_said_to_be_absent(
    theirs: Path, finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("recipe.yaml", "weights.safetensors"):
        shutil.copy(finished_run / name, theirs / "run" / name)
    (theirs / "run" / "weights.safetensors").chmod(0)
    if os.getuid() and os.access(theirs / "run" / "weights.safetensors", os.R_OK):
        pytest.skip("this user may read everything")
    with another_user(theirs):
        said = mistake(["predict", str(theirs / "run"), "x.png"], capsys)
    assert "weights.safetensors cannot be read as safetensors: Permission denied" in said


def test_a_run_in_a_closed_folder_is_not_said_to_be_absent(theirs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (theirs / "run").chmod(0)
    with another_user(theirs):
        said = mistake(["report", str(theirs / "run")], capsys)
    (theirs / "run").chmod(0o755)
    assert f"{theirs / 'run'}/" in said
    assert ": permission denied" in said


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that was started with the number of a user whom it does not know."""

    def unknown(number: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {number}")

    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "TLTRAIN_CACHE", "TLTRAIN_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)


@pytest.mark.usefixtures("homeless")
def test_a_user_without_a_home_needs_one_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for root in (paths.cache_root, paths.data_root):
        with pytest.raises(UserError, match=f"user {os.getuid()} has no home folder.*set TLTRAIN_CACHE"):
            root()
    with pytest.raises(UserError, match="no home folder is known"):
        paths.absolute("~/images")
    assert site.defaults().nodes == 1, "no home, no site defaults"
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    assert paths.cache_root() == tmp_path / "cache"
    assert paths.data_root() == tmp_path / "cache" / "data"


@pytest.mark.parametrize(("umask", "folders", "plain"), [(0o022, 0o755, 0o644), (0o002, 0o775, 0o664), (0o077, 0o700, 0o600)])
def test_what_others_may_do_follows_the_umask(
    umask: int, folders: int, plain: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    before = os.umask(umask)
    try:
        words = ["--smoke", "--cache-images", "never", "--workers", "0", "--save-steps", "1"]
        assert main(["train", "digits-resnet", "--folder", str(tmp_path / "run"), *words]) == 0
    finally:
        os.umask(before)
    for path in [*(tmp_path / "run").rglob("*"), *(tmp_path / "cache").rglob("*")]:
        assert path.stat().st_mode & 0o777 == (folders if path.is_dir() else plain), path


def test_a_claim_is_a_plain_file(tmp_path: Path) -> None:
    (tmp_path / "generations").mkdir()
    assert run_dir.claim(tmp_path) == 1
    assert (tmp_path / "generations" / "000001").stat().st_mode & 0o111 == 0


def test_offline_is_said_to_be_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match="not in torch's cache, and HF_HUB_OFFLINE is set: nothing is downloaded; download https"):
        torchvision_hub.read_state(torchvision_hub.find("resnet50", "IMAGENET1K_V2"))


def test_offline_names_the_hubs_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    from tltrain.models import hf_hub

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="it is not in the hub's cache, and HF_HUB_OFFLINE is set"):
        hf_hub.download("nobody/nothing-of-this-name", network=True)


def test_a_file_of_weights_of_another_kind_is_said_to_be_that(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "net.pth").write_bytes(b"")
    said = mistake(["plan", "digits-resnet", "--backbone.weights", str(tmp_path / "net.pth")], capsys)
    assert "net.pth cannot be used: it is empty" in said
