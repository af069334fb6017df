"""`tltrain.train` in a script without a guard, in a thread, at a prompt: it trains, or says what to do."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import made_recipe

ROOT = Path(__file__).parent.parent
TRAIN = "tltrain.train('r.yaml', folder='run', workers=2, cache='never', smoke=True)"
THREAD = """
import threading, tltrain
def work():
    try:
        print('ended', {train}.outcome['outcome'])
    except tltrain.core.errors.UserError as error:
        print('UserError:', error)
import tltrain.core.errors
thread = threading.Thread(target=work)
thread.start()
{then}
"""
LOOP = f"import asyncio, tltrain\nasync def cell():\n    print('ended', {TRAIN}.outcome['outcome'])\nasyncio.run(cell())\n"
OWN = """
from dataclasses import replace
import tltrain
import tltrain.training.setup as setup
from tltrain.core.errors import UserError

opened = setup.open_images

class Read:
    def __init__(self, read):
        self.read = read
    def __call__(self, number):
        return self.read(number)

def open_images(spec, **options):
    found = opened(spec, **options)
    return replace(found, train=replace(found.train, read=Read(found.train.read)))

setup.open_images = open_images
try:
    print('ended', {train}.outcome['outcome'])
except UserError as error:
    print('UserError:', error)
"""


def python(words: list[str], folder: Path, stdin: str | None = None) -> str:
    """What a program printed; no stack trace is allowed."""
    (folder / "r.yaml").write_text(made_recipe().to_yaml())
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [sys.executable, *words], input=stdin, env=env, cwd=folder, capture_output=True, text=True, check=False, timeout=200
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("how", ["in a thread", "at a prompt"])
def test_a_run_with_workers_ends(how: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(THREAD.format(train=TRAIN, then="thread.join()"))
    said = python(["script.py"], tmp_path) if how == "in a thread" else python([], tmp_path, stdin=LOOP)
    assert "ended finished" in said


def test_a_thread_that_outlives_its_program_is_told_to_be_joined(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(THREAD.format(train=TRAIN, then=""))
    said = python(["script.py"], tmp_path)
    assert "UserError: the main program has ended" in said
    assert "thread.join()" in said


@pytest.mark.slow
def test_what_workers_cannot_find_is_said_with_a_hint(tmp_path: Path) -> None:
    said = python([], tmp_path, stdin=OWN.format(train=TRAIN))
    assert "UserError: what reads the images is defined in a notebook" in said
    assert "or take workers=0" in said


@pytest.mark.slow
def test_a_script_that_its_workers_run_anew_is_told_of_the_guard(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(OWN.format(train=TRAIN))
    said = python(["script.py"], tmp_path)
    assert 'if __name__ == "__main__":' in said
    assert said.count("UserError:") == 1, "the workers themselves train nothing"
