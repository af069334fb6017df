"""Runs on each source: a smoke test, a run that is stopped and goes on, and one on two processes, from files and from servers."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from conftest import ALL, made_recipe, slow
from published_files import PUBLISHED, published
from source_sets import KINDS, made_source, served
from world_recipe import FIXED
from world_trials import stop_and_go_on

from benchmarks import trials, world
from benchmarks.world import Trial
from tltrain.cli.main import main
from tltrain.runs.metrics_log import read_rows


def _made(kind: str, root: Path, web: str) -> str:
    return made_source(kind, root / kind)


def _published(name: str, root: Path, web: str) -> str:
    return published(name, root)


def _web(kind: str, file: str, root: Path, web: str) -> str:
    """The source of a made set behind a web server of `root`."""
    pytest.importorskip("aiohttp")
    made_source(kind, root / kind)
    return f"{kind}:{web}/{kind}/{file}"


FILES = {"zip": "digits.zip", "csv": "digits.csv", "parquet": "digits.parquet", "webdataset": "train-{0..0}.tar"}
SOURCES: dict[str, Callable[[Path, str], str]] = {
    **{kind: partial(_made, kind) for kind in KINDS if kind != "torchvision"},
    **{f"torchvision:{name}": partial(_published, name) for name in PUBLISHED},
    **{f"{kind}:https": partial(_web, kind, file) for kind, file in FILES.items()},
}
"""Name to what makes the set in a folder, which a web server shows at an address, and returns data.source."""
QUICK = ("folder", "webdataset", "torchvision:OxfordIIITPet")


class Made:
    """Sets and their undisturbed runs of one process, made when they are asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self._sources, self._runs = root, dict[str, str](), dict[str, Path]()

    def source(self, name: str, web: str) -> str:
        if name not in self._sources:
            root = self._folder(name) / "set"
            shutil.rmtree(root, ignore_errors=True)  # half made where a package is missing and another test was skipped
            root.mkdir(parents=True)
            self._sources[name] = SOURCES[name](root, f"{web}/{root.relative_to(self.root)}")
        return self._sources[name]

    def trial(self, name: str, run: str, web: str, num: int = 1) -> Trial:
        """A run in float64 whose cache is empty, so that it scans, unpacks and fetches by itself."""
        stage = ALL | FIXED | {"steps": 5}
        data = {"source": self.source(name, web), "per_class": None, "eval_limit": 19}
        recipe = made_recipe(batch=7, data=data, stages=[stage]).model_dump(mode="json")
        places = {"TLTRAIN_CACHE": str(self._folder(name) / f"cache-{run}"), "TLTRAIN_DATA": str(self._folder(name) / "set")}
        start = {"workers": 1 if (name, num) == ("zip", 2) else 0}  # of containers, which have one reader
        return Trial(recipe, str(self._folder(name) / run), num, start=start, float64=True, environment=places)

    def whole(self, name: str, web: str) -> Path:
        if name not in self._runs:
            self._runs[name] = world.finish(self.trial(name, "whole", web))
        return self._runs[name]

    def _folder(self, name: str) -> Path:
        return self.root / name.replace(":", "-")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="module")
def web(made: Made) -> Iterator[str]:
    """The address of a web server of all sets."""
    with served(made.root) as address:
        yield address


@pytest.mark.parametrize("name", [name if name in QUICK else slow(name) for name in SOURCES])
def test_the_smoke_test_of_a_recipe_ends(name: str, made: Made, web: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = made.source(name, web)
    monkeypatch.setenv("TLTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TLTRAIN_DATA", str(made.root / name.replace(":", "-") / "set"))
    small = ["--backbone.name", "resnet-micro", "--backbone.weights", "None", "--data.size", "32", "--data.resize", "None"]
    words = ["train", "folder-resnet50", "--data.source", source, *small, "--folder", str(tmp_path / "run"), "--smoke", "--workers", "0"]
    assert main(words) == 0
    steps = [row["step"] for row in read_rows(tmp_path / "run") if row["kind"] == "train"]
    assert steps == [1, 2] * 3, "of each of its stages"
    assert world.outcome(tmp_path / "run")["outcome"] == "finished"


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_a_run_that_is_stopped_and_goes_on_ends_as_it_would_have(name: str, made: Made, web: str) -> None:
    resumed = stop_and_go_on(made.trial(name, "resumed", web), 3)
    assert trials.differences(resumed, made.whole(name, web)) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_two_processes_end_with_the_weights_of_one(name: str, made: Made, web: str) -> None:
    two = world.finish(made.trial(name, "two", web, num=2))
    assert trials.distance(two, made.whole(name, web)) < 1e-9
    assert _losses(two) == pytest.approx(_losses(made.whole(name, web)), rel=1e-9)


def _losses(run: Path) -> list[Any]:
    return [row["loss"] for row in read_rows(run) if row["kind"] in ("train", "val", "test")]
