"""`tltrain launch local`: a run on this machine, with all its GPUs, or with processes on the CPU that really form one world."""

from __future__ import annotations

import argparse
import os
import socket
import sys
from collections.abc import Sequence

from launcher import processes, quoting
from launcher.batch import outcome_since
from launcher.processes import World
from launcher.supervise import supervise
from launcher.words import read, split
from tltrain import folder, watch
from tltrain.errors import UserError

EXIT = {"finished": 0, "stopped": 75}  # as `tltrain train` itself


def main(words: Sequence[str]) -> int:
    """Check the command, start it by `accelerate launch`, wait. Returns what `tltrain train` would: 0, 1 failed, 75 stopped and saved."""
    own, trainings = split(words)
    parser = argparse.ArgumentParser(prog="tltrain launch local", description=main.__doc__)
    parser.add_argument("--accelerate", help="a name in accelerate_configs/ such as ddp, or a file; the default follows from the GPUs")
    parser.add_argument("--processes", type=int, help="number of processes; the default is one for each GPU, or one")
    parser.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    arguments = parser.parse_args(own)
    if len(trainings) > 1:
        raise UserError("launch local starts one command; start the next one when it is done: a && b")
    training = read(trainings[0])
    world = local_world(processes.local_gpus(), arguments.accelerate, arguments.processes)
    config = processes.config_file(arguments.accelerate, world)
    command = processes.arguments(config, world, 0, trainings[0])
    notes = training.run / "jobs" / "local"
    environment = processes.environment(world, notes)
    if arguments.dry_run:
        print(" ".join(["env", *(quoting.quote(f"{k}={v}") for k, v in environment.items()), quoting.join(command)]))
        return 0
    folder.create(training.run, training.recipe)
    notes.mkdir(parents=True, exist_ok=True)
    before = watch.newest_generation(training.run / "generations")
    for note in notes.glob("*.failed.json"):
        note.unlink()
    end = supervise(command, environment)
    outcome = outcome_since(training.run, before)
    if not outcome and end.code != 0 and end.signals.count("SIGINT") < 2:
        print(f"launch  {processes.explain(end.code, notes)}", file=sys.stderr)
    return EXIT.get(str(outcome.get("outcome")), 1)


def local_world(gpus: int, accelerate: str | None, num_processes: int | None) -> World:
    """The processes of one machine. Raises UserError for more of them than GPUs."""
    on_gpus = gpus > 0 and accelerate != "cpu"
    wanted = num_processes if num_processes is not None else (gpus if on_gpus and accelerate != "one_gpu" else 1)
    if wanted < 1:
        raise UserError(f"--processes is {wanted}; it must be at least 1")
    if on_gpus and wanted > gpus:
        raise UserError(f"--processes is {wanted}, and this machine has {gpus} GPUs; one process needs one GPU, or choose --accelerate cpu")
    if accelerate == "one_gpu" and wanted > 1:
        raise UserError(f"--processes is {wanted} and --accelerate one_gpu; choose ddp")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, cores // wanted))
    return World(1, wanted, on_gpus, threads, port=_free_port())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
