"""Cases of `python -m benchmarks.faults` that need the command itself (pipes, locks, Ctrl-C), and the list of all cases."""

from __future__ import annotations

import argparse
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks import hindrances, trials
from benchmarks.hindrances import PHASES, START, Place, Skipped, wrong
from benchmarks.trials import HEAD, References


def command(place: Place, *words: str, **changes: Any) -> tuple[list[str], dict[str, str]]:
    """The words and the environment of `tltrain train` on a recipe of trials, as a user starts it."""
    (place.folder / "r.yaml").write_text(yaml.safe_dump(trials.recipe(**changes)))
    run = [sys.executable, "-m", "tltrain", "train", str(place.folder / "r.yaml"), "--folder", str(place.folder / "run")]
    return [*run, *words], {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}


def small_shared_memory(place: Place) -> list[str]:
    words, environment = command(place, "--workers", "2", stages=[HEAD])
    inside = f"mount -t tmpfs -o size=256k tmpfs /dev/shm && exec {subprocess.list2cmdline(words)}"
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True, check=False).returncode != 0:
        raise Skipped("only root can have a /dev/shm of its own")
    done = subprocess.run(["unshare", "-m", "sh", "-c", inside], env=environment, capture_output=True, text=True, check=False, timeout=150)
    if "permission denied" in done.stderr.lower() and "mount" in done.stderr:
        raise Skipped("no mount is allowed here")
    return wrong(finished=done.returncode == 0, said="/dev/shm has" in done.stderr, remedy="--shm-size" in done.stderr)


def reader_goes_away(place: Place) -> list[str]:
    words, environment = command(place)
    with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.stdout.close()
        code = child.wait(timeout=150)
    return [*wrong(finished=code == 0), *trials.differences(place.folder / "run", place.references(1))]


def pipes_among_the_files(place: Place) -> list[str]:
    """A pipe in the place of an image, a recipe, a CSV, or a file of a run: each is said, none is waited for."""
    shutil.copytree(place.references(1), place.folder / "run")
    pictures, found = place.folder / "pictures", []
    for name in ("a/1.png", "b/1.png"):
        (pictures / name).parent.mkdir(parents=True)
        os.mkfifo(pictures / name)
    for name in ("pipe.yaml", "pipe.csv"):
        os.mkfifo(place.folder / name)
    tries: dict[str, list[str]] = {
        "images": ["train", "folder-resnet50", "--data.source", f"folder:{pictures}", "--folder", str(place.folder / "x")],
        "recipe": ["plan", str(place.folder / "pipe.yaml")],
        "csv": ["train", "folder-resnet50", "--data.source", f"csv:{place.folder / 'pipe.csv'}", "--folder", str(place.folder / "y")],
        "predict": ["predict", str(place.folder / "run"), str(pictures / "a" / "1.png")],
    }
    for name in ("metrics-000001.jsonl", "outcome.json", "recipe.yaml", "weights.safetensors", "test_predictions.csv"):
        tries[name] = ["compare" if name == "test_predictions.csv" else "report", str(place.folder / name.replace(".", "-"))]
        shutil.copytree(place.folder / "run", tries[name][1])
        (Path(tries[name][1]) / name).unlink()
        os.mkfifo(Path(tries[name][1]) / name)
    for name, words in tries.items():
        try:
            done = subprocess.run(
                [sys.executable, "-m", "tltrain", *words], capture_output=True, text=True, check=False, timeout=60, cwd=place.folder
            )
        except subprocess.TimeoutExpired:
            found.append(f"a pipe as {name} is waited for")
        else:
            found += [f"a pipe as {name}: a stack trace"] * ("Traceback" in done.stderr)
    return found


def stop_while_waiting_for_a_lock(place: Place) -> list[str]:
    """Another process reads the same images, and holds their lock; SIGTERM is heard at once."""
    words, environment = command(place, data={"source": f"folder:{place.folder / 'pictures'}", "size": 32, "resize": 32})
    environment["TLTRAIN_CACHE"] = str(place.folder / "cache")
    shutil.copytree(Path(__file__).parent.parent / "docs" / "images", place.folder / "pictures" / "a")
    shutil.copytree(place.folder / "pictures" / "a", place.folder / "pictures" / "b")
    subprocess.run([*words, "--smoke"], env=environment, capture_output=True, check=False, timeout=150)  # makes the lock
    lock = next((place.folder / "cache" / "scans").glob("*.lock"))
    next((place.folder / "cache" / "scans").glob("*.scan")).unlink()  # what is known needs no lock
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        heard = "before the first step"
        code, seconds, said = signalled(words, environment, "waiting for another process", [signal.SIGTERM], heard)
    return wrong(stopped=code == 75, at_once=seconds < 30, said=heard in said)  # the lock is never given up


def two_interrupts(place: Place) -> list[str]:
    """The main thread is held by a system call that no signal ends, as by a dead network mount."""
    words, environment = command(place)
    start = f"import sys; from benchmarks import faults; faults.hang_in(*{PHASES['images']!r}, 'stuck'); "
    start += f"print('planted', flush=True); sys.argv = {words[2:]!r}; from tltrain.cli.main import main; sys.exit(main())"
    code, seconds, said = signalled([words[0], "-c", start], environment, "planted", [signal.SIGINT, signal.SIGINT])
    return wrong(interrupted=code == 130, soon=seconds < 25, said="interrupted" in said)


def signalled(
    words: Sequence[str], environment: dict[str, str], awaited: str, signals: Sequence[int], heard: str | None = None
) -> tuple[int, float, str]:
    """(exit code, seconds, output) of a command that gets signals once it has printed `awaited`.

    The seconds are from the last signal to the end, or to the text `heard`: on a loaded machine Python itself may take long to end.
    """
    with tempfile.TemporaryFile("w+") as output:
        child = subprocess.Popen(words, env=environment, stdout=output, stderr=subprocess.STDOUT, text=True)
        try:
            deadline = time.monotonic() + 120
            while awaited not in _printed(output) and child.poll() is None and time.monotonic() < deadline:
                time.sleep(0.1)
            for number in signals:
                time.sleep(2.0)
                child.send_signal(number)
            began = time.monotonic()
            while heard is not None and heard not in _printed(output) and child.poll() is None and time.monotonic() < began + 60:
                time.sleep(0.1)
            answered = time.monotonic()
            code = child.wait(timeout=60)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        return code, (time.monotonic() if heard is None else answered) - began, _printed(output)


def _printed(output: Any) -> str:
    output.seek(0)
    return str(output.read())


CASES: dict[str, Callable[[Place], list[str]]] = {
    **{f"SIGTERM, {phase}": partial(hindrances.stopped_in, phase=phase) for phase in PHASES},
    "a step waits for ever": partial(hindrances.hangs, phase="step", how="waits"),
    "a step is stuck": partial(hindrances.hangs, phase="step", how="stuck"),
    "an evaluation waits for ever": partial(hindrances.hangs, phase="evaluation", how="waits"),
    "the saver's disk is stuck": hindrances.disk_of_the_saver_hangs,
    "a data worker is killed": hindrances.killed_data_worker,
    "an error after the claim": hindrances.error_after_the_claim,
    "the run folder is renamed": hindrances.renamed_run,
    "a full disk": hindrances.full_disk,
    "an old checkpoint stays": hindrances.old_checkpoint_stays,
    "a small /dev/shm": small_shared_memory,
    "the reader of stdout goes away": reader_goes_away,
    "pipes among the files": pipes_among_the_files,
    "a stop while waiting for a lock": stop_while_waiting_for_a_lock,
    "two Ctrl-C where nothing answers": two_interrupts,
}


def run_all(words: Sequence[str] | None, about: str) -> None:
    """Run the cases, print a line for each, and exit with 1 if one went wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.faults", description=about)
    parser.add_argument("--only", default="", metavar="REGEX", help="cases whose name matches (default: all)")
    arguments = parser.parse_args(words)
    began, num_wrong, num_skipped = time.monotonic(), 0, 0
    chosen = {name: case for name, case in CASES.items() if re.search(arguments.only, name)}
    with tempfile.TemporaryDirectory() as scratch:
        references = References(Path(scratch) / "undisturbed", START)
        for number, (name, case) in enumerate(chosen.items()):
            folder = Path(scratch) / str(number)
            folder.mkdir()
            try:
                problems = case(Place(folder, references))
                said = "; ".join(f"not so: {problem}" for problem in problems) or "as it should"
            except Skipped as skipped:
                problems, said, num_skipped = [], f"left out: {skipped}", num_skipped + 1
            except Exception as error:
                problems = [f"{type(error).__name__}: {str(error)[-300:]}"]
                said = problems[0]
            num_wrong += bool(problems)
            print(f"{name:34} {said}", flush=True)
    seconds = time.monotonic() - began
    print(f"{len(chosen)} cases, {num_wrong} wrong, {num_skipped} left out, {seconds:.0f} s")
    raise SystemExit(num_wrong > 0)
