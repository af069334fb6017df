"""Links in a run folder of somebody else: nothing outside it is written, renamed or deleted."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from conftest import made_recipe

from tltrain.core.errors import UserError
from tltrain.core.flags import RunFlags
from tltrain.runs import run_dir
from tltrain.runs.links import WRITTEN_IN, append_only, check_links
from tltrain.training.run import train


def tree(folder: Path) -> dict[str, tuple[bool, bytes]]:
    return {str(p.relative_to(folder)): (p.is_dir(), b"" if p.is_dir() else p.read_bytes()) for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("place", [*WRITTEN_IN, "stages/00-head", "stages/all", "checkpoints/000001-00-00000001-0", "jobs/8"])
def test_a_subfolder_that_leads_outside_is_refused_and_its_target_is_untouched(place: str, tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    run_dir.create(run, made_recipe())
    (outside / "000000-00-00000000-0").mkdir(parents=True)
    (outside / "precious").write_text("x")
    before = tree(outside)
    link = run / place
    link.parent.mkdir(exist_ok=True)
    if link.is_dir():
        shutil.rmtree(link)
    link.symlink_to(outside)
    with pytest.raises(UserError, match="is a link to") as caught:
        train(made_recipe(), RunFlags(folder=run, workers=0))
    assert str(link) in str(caught.value)
    with pytest.raises(UserError, match="is a link to"):
        run_dir.create(run, made_recipe())
    assert tree(outside) == before


def test_links_that_stay_inside_and_a_run_folder_that_is_one_are_fine(tmp_path: Path) -> None:
    run = tmp_path / "elsewhere"
    run_dir.create(run, made_recipe())
    (run / "real").mkdir()
    (run / "jobs").symlink_to("real")
    (tmp_path / "run").symlink_to(run)
    check_links(tmp_path / "run")
    check_links(tmp_path / "absent")


def test_a_link_to_nothing_is_refused_too(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run_dir.create(run, made_recipe())
    (run / "jobs").symlink_to(tmp_path / "not there yet")
    with pytest.raises(UserError, match="is a link to"):
        check_links(run)


@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_lines_go_into_plain_files_alone(kind: str, tmp_path: Path) -> None:
    target, path = tmp_path / "target", tmp_path / "metrics-000001.jsonl"
    if kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(target)
    if kind == "link":
        target.write_text("theirs")
    with pytest.raises(UserError, match="a link or a pipe"):
        append_only(path)
    assert (target.read_text() if kind == "link" else target.exists()) == ("theirs" if kind == "link" else False)


def test_the_rows_of_a_start_follow_no_link(tmp_path: Path) -> None:
    from tltrain.runs.metrics_log import MetricsLog

    (tmp_path / "theirs").write_text("")
    (tmp_path / "metrics-000001.jsonl").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match="a link or a pipe"):
        MetricsLog(tmp_path, 1, {"from": None})
    assert (tmp_path / "theirs").read_text() == ""
