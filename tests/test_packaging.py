"""What is installed: the wheel works away from the checkout, and accelerate reads the configurations that come with it."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from accelerate.commands.launch import launch_command_parser

import tltrain

ROOT = Path(__file__).resolve().parent.parent
SPREAD = {"cpu": "NO", "one_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT), cwd=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def away(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds tltrain as the wheel brings it, and nothing else."""
    target = tmp_path_factory.mktemp("away")
    _run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=target)
    return target


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    package = {str(p.relative_to(ROOT)) for folder in ("tltrain", "launcher") for p in _files(ROOT / folder)}
    share = {f"tltrain/_share/{p.relative_to(ROOT)}" for folder in ("accelerate_configs", "slurm") for p in _files(ROOT / folder)}
    assert inside == package | share
    assert {f"tltrain/_share/accelerate_configs/{name}.yaml" for name in SPREAD} <= inside
    assert {f"tltrain/_share/slurm/{name}.sbatch" for name in ("train", "array", "chain")} <= inside
    assert "tltrain/recipes/recipe.schema.json" in inside


def test_the_installed_wheel_plans_a_shipped_recipe(away: Path, tmp_path: Path) -> None:
    done = _away(away, tmp_path, "-m", "tltrain", "plan", "digits-resnet")
    assert "head" in done
    assert list(tmp_path.iterdir()) == [], "a plan writes nothing"


def test_the_installed_wheel_finds_what_it_shares(away: Path, tmp_path: Path) -> None:
    code = "import tltrain, tltrain.core.recipe as r; print(tltrain.share(), *r.shipped())"
    share, *names = _away(away, tmp_path, "-c", code).split()
    assert Path(share) == away / "tltrain" / "_share"
    assert {p.stem for p in Path(share, "accelerate_configs").iterdir()} == set(SPREAD)
    assert Path(share, "slurm", "train.sbatch").is_file()
    assert "digits-resnet" in names


def test_the_checkout_finds_what_it_shares() -> None:
    assert {p.stem for p in (tltrain.share() / "accelerate_configs").glob("*.yaml")} == set(SPREAD)
    assert (tltrain.share() / "slurm" / "train.sbatch").is_file()


@pytest.mark.parametrize("name", SPREAD)
def test_accelerate_reads_the_configuration(name: str) -> None:
    config = load_config_from_file(str(tltrain.share() / "accelerate_configs" / f"{name}.yaml"))
    assert isinstance(config, ClusterConfig)
    assert config.distributed_type.value == SPREAD[name]
    assert config.mixed_precision == ("no" if name == "cpu" else "bf16")
    assert config.use_cpu is (name == "cpu")
    alone = SPREAD[name] == "NO"
    assert config.num_processes == (1 if alone else -1), "how many processes there are is said at launch: accelerate asks for it at -1"
    assert not {"gradient_clipping", "gradient_accumulation_steps"} & set(config.deepspeed_config), "those are the recipe's"
    options = {action.dest for action in _parser()._actions}
    assert {*config.fsdp_config, *config.deepspeed_config} <= options, "accelerate silently ignores a key that it does not know"


def _parser() -> argparse.ArgumentParser:
    parser = launch_command_parser()
    assert isinstance(parser, argparse.ArgumentParser)
    return parser


def _files(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts]


def _away(away: Path, cwd: Path, *arguments: str) -> str:
    return _run(sys.executable, *arguments, cwd=cwd, PYTHONPATH=str(away))


def _run(*command: str, cwd: Path, **environment: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout
