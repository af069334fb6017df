"""Plants known bugs one at a time in a copy of the tree, and runs the quick tests that must see each: tests that can fail."""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
OURS = {"tltrain", "launcher", "benchmarks"}
PRELOADED = (
    "torch", "torchvision.transforms.v2", "transformers.models.vit.modeling_vit", "accelerate", "sklearn.datasets", "sklearn.metrics",
    "scipy.optimize", "matplotlib.figure", "hypothesis", "pytest",
)  # fmt: skip
"""Imported once: each bug has a forked process, and costs its tests and no imports."""
LONGEST_S = 300.0


@dataclass(frozen=True)
class Mutant:
    """One small edit of the source, and the tests that must fail with it."""

    bug: str
    file: str
    old: str
    """Stands once in the file."""
    new: str
    tests: tuple[str, ...]
    """Ids of pytest; one without brackets stands for all its parameters, of which at least one must fail."""

    def planted(self, root: Path) -> str:
        """The text of the file with the bug in it. Raises ValueError where `old` does not stand there once."""
        text = (root / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise ValueError(f"{self.bug}: {self.old!r} stands {text.count(self.old)} times in {self.file}; it must stand there once")
        return text.replace(self.old, self.new)

    def unknown_tests(self, root: Path) -> list[str]:
        """Its tests that no file defines."""
        return [test for test in self.tests if test.partition("::")[2].partition("[")[0] not in _functions(root / test.partition("::")[0])]


def _functions(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8")) if file.is_file() else ast.Module([], [])
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def mutants() -> list[Mutant]:
    """Those of mutants.yaml."""
    rows = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return [Mutant(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def copy_tree(folder: Path) -> Path:
    """A copy of what git tracks, and of what it would."""
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    for name in subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if name and (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


class _Failed:
    """A plugin of pytest that keeps what failed, and what could not be run at all."""

    def __init__(self) -> None:
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


@dataclass(frozen=True)
class Outcome:
    """What a run of tests came to."""

    code: int
    """pytest's exit code; -9 where the tests did not end in time."""
    failed: tuple[str, ...]
    output: str


def run_tests(root: Path, tests: Iterable[str], longest_s: float = LONGEST_S) -> Outcome:
    """Run tests of a copy of the tree in a forked process, with that copy's modules, and end it after so many seconds."""
    log, result = root.with_name(f"{root.name}.log"), root.with_name(f"{root.name}.json")
    result.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        _pytest(root, list(tests), log, result)
    deadline = time.monotonic() + longest_s
    while (ended := os.waitpid(pid, os.WNOHANG))[0] == 0:
        if time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
            ended = os.waitpid(pid, 0)
            break
        time.sleep(0.02)
    failed = tuple(json.loads(result.read_text())) if result.exists() else ()
    return Outcome(os.waitstatus_to_exitcode(ended[1]), failed, log.read_text(errors="replace"))


def _pytest(root: Path, tests: list[str], log: Path, result: Path) -> None:
    """Never returns."""
    handle = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(root)
    for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
        del sys.modules[name]  # of the tree that this command was started in
    sys.path.insert(0, str(root))
    os.environ["PYTHONPATH"] = str(root)  # for the processes that tests start
    sys.dont_write_bytecode = True  # of a source that changes twice a second
    recorder, code = _Failed(), 3
    try:
        import pytest

        options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", f"--basetemp={root.with_name(root.name + '.tmp')}"]
        code = int(pytest.main([*options, *tests], plugins=[recorder]))
        result.write_text(json.dumps(recorder.failed))
    finally:
        sys.stdout.flush()
        os._exit(code)


def problem(mutant: Mutant, outcome: Outcome) -> str | None:
    """Why a bug does not count as seen; None where each of its tests has failed."""
    if outcome.code != 1:
        return f"pytest ended with {outcome.code}, not with failed tests:\n{outcome.output[-2000:]}"
    unseen = [test for test in mutant.tests if not any(failed == test or failed.startswith(f"{test}[") for failed in outcome.failed)]
    return f"not seen by {', '.join(unseen)}" if unseen else None


def plant(root: Path, mutant: Mutant) -> tuple[str | None, float]:
    """(why it was not seen, or None; seconds) of one bug in a copy of the tree, which is mended again."""
    file, began = root / mutant.file, time.monotonic()
    whole = file.read_text(encoding="utf-8")
    try:
        file.write_text(mutant.planted(root), encoding="utf-8")
        return problem(mutant, run_tests(root, mutant.tests)), time.monotonic() - began
    finally:
        file.write_text(whole, encoding="utf-8")


def _worker(folder: Path, share: Sequence[Mutant], results: Any) -> None:
    root = copy_tree(folder)
    for mutant in share:
        results.put((mutant.bug, *plant(root, mutant)))


def all_planted(chosen: Sequence[Mutant], scratch: Path, jobs: int) -> Iterator[tuple[str, str | None, float]]:
    """(bug, why it was not seen or None, seconds) of each, as they end."""
    context = multiprocessing.get_context("fork")  # with all that is imported here
    results = context.Queue()
    workers = [context.Process(target=_worker, args=(scratch / f"{j}", chosen[j::jobs], results)) for j in range(jobs)]
    for worker in workers:
        worker.start()
    for _ in chosen:
        yield results.get()
    for worker in workers:
        worker.join()


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="a regular expression: the bugs whose name it matches (default: all)")
    parser.add_argument("--jobs", type=int, default=2, help="bugs at a time, each in a copy of its own (default: 2)")
    arguments = parser.parse_args(words)
    chosen = [mutant for mutant in mutants() if re.search(arguments.only, mutant.bug)]
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in PRELOADED:
        import_module(name)
    began, unseen = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch:
        tests = dict.fromkeys(test for mutant in chosen for test in mutant.tests)
        sound = run_tests(copy_tree(Path(scratch) / "sound"), tests, LONGEST_S * max(1.0, len(tests) / 50))
        if sound.code != 0:
            ended = "did not end in time" if sound.code == -9 else "did not"
            raise SystemExit(f"without a bug the same tests must pass, and {ended}:\n{sound.output[-3000:]}")
        print(f"{len(tests)} tests pass without a bug, {time.monotonic() - began:.0f} s", flush=True)
        for bug, why, seconds in all_planted(chosen, Path(scratch), max(1, min(arguments.jobs, len(chosen)))):
            unseen += why is not None
            print(f"{seconds:5.1f} s  {bug}: {why or 'seen'}", flush=True)
    print(f"{len(chosen)} bugs planted, {unseen} not seen, {time.monotonic() - began:.0f} s")
    raise SystemExit(unseen > 0)


if __name__ == "__main__":
    main()
