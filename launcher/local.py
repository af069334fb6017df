"""`tltrain launch local`: starts a run on this machine, one process for each GPU, or on the CPU."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from launcher import accelerate as processes
from launcher import shell
from launcher.accelerate import World
from launcher.command import check_processes, read, split
from launcher.slurm.batch import outcome_since
from launcher.supervise import supervise
from launcher.target import Target
from tltrain.core.errors import Parser, UserError
from tltrain.core.host.cores import num_cores
from tltrain.core.output import wrapping
from tltrain.runs import heartbeat, run_dir

BF16_FROM = 8.0  # compute capability
PRECISION_NAMES = {"no": "fp32"}  # accelerate's name for a precision, to the usual one
EXIT = {"finished": 0, "stopped": 75}  # as `tltrain train` itself


def main(argv: Sequence[str]) -> int:
    """Check the command, start it by `accelerate launch`, wait. Returns what `tltrain train` would: 0, 1 failed, 75 stopped and saved."""
    own, trainings = split(argv)
    parser = Parser(prog="tltrain launch local", description=main.__doc__)
    parser.add_argument("--accelerate", help="a name in accelerate_configs/ such as ddp, or a file; the default follows from the GPUs")
    parser.add_argument("--processes", type=int, help="number of processes; the default is one for each GPU, or one")
    parser.add_argument("--dry-run", action="store_true", help="print the command and start nothing")
    arguments = parser.parse_args(own)
    if len(trainings) > 1:
        raise UserError("launch local starts one command; start the next one when it is done: a && b")
    training = read(trainings[0])
    world = local_world(processes.local_gpus(), arguments.accelerate, arguments.processes)
    check_processes(training, world.num_processes)
    config = processes.config_file(arguments.accelerate, world)
    precision, why, override = pick_precision(config, world, None if not world.gpus else capability())
    command = processes.arguments(config, world, 0, trainings[0])
    at = command.index(str(config)) + 1
    command[at:at] = override
    where = "GPU" if world.gpus else "the CPU"
    num = f"{world.num_processes} process{'es' if world.num_processes > 1 else ''}"
    line = f"launch  {num} on {where}, {PRECISION_NAMES.get(precision, precision)}: {why}"
    notes = training.run / "jobs" / "local"
    environment = processes.environment(world, notes)
    if arguments.dry_run:
        print(f"# {line}")
        print(" ".join(["env", *(shell.quote(f"{k}={v}") for k, v in environment.items()), shell.join(command)]))
        return 0
    run_dir.create(training.run, training.recipe)
    notes.mkdir(parents=True, exist_ok=True)
    print(line, flush=True)
    while True:
        before = heartbeat.newest_generation(run_dir.generations(training.run))
        for note in notes.glob("*.failed.json"):
            note.unlink()
        end = supervise(command, environment)
        outcome = outcome_since(training.run, before)
        if outcome.get("signal") != run_dir.OUT_OF_MEMORY or end.signals:
            break
        print("launch  out of memory: started again, with less at a time", flush=True)
    if not outcome and end.code != 0 and end.signals.count("SIGINT") < 2:
        wrapping.say(f"launch  {processes.explain(end.code, notes)}", sys.stderr)
    return EXIT.get(str(outcome.get("outcome")), 1)


def local_world(gpus: int, accelerate: str | None, num_processes: int | None) -> World:
    """Number, device type and threads of the processes on this machine. Raises UserError where GPUs are used and there are too few."""
    on_gpus = gpus > 0 and accelerate != "cpu"
    wanted = num_processes if num_processes is not None else (gpus if on_gpus and accelerate != "one_gpu" else 1)
    if wanted < 1:
        raise UserError(f"--processes is {wanted}; it must be at least 1")
    if on_gpus and wanted > gpus:
        raise UserError(f"--processes is {wanted}, and this machine has {gpus} GPUs; one process needs one GPU, or choose --accelerate cpu")
    if accelerate == "one_gpu" and wanted > 1:
        raise UserError(f"--processes is {wanted} and --accelerate one_gpu; choose ddp")
    threads = int(os.environ.get("OMP_NUM_THREADS") or max(1, num_cores() // wanted))
    return World(1, wanted, on_gpus, threads, port=_free_port())


def pick_precision(config: Path, world: World, capability: float | None) -> tuple[str, str, list[str]]:
    """Precision of the run: the configuration's own, or fp16 where a shipped configuration asks for bf16 and a GPU has no bf16 units.

    capability: the lowest compute capability of the GPUs. None where there is no GPU, or where it is not known.
    Returns (accelerate's mixed_precision, the reason, arguments of `accelerate launch` that override the configuration).
    """
    written = str((yaml.safe_load(config.read_text(encoding="utf-8")) or {}).get("mixed_precision") or "no")
    shipped = config.parent == processes.config_file("cpu", world).parent
    if shipped and written == "bf16" and capability is not None and capability < BF16_FROM:
        return "fp16", f"{config.name} says bf16, which a GPU of compute capability {capability:.1f} lacks", ["--mixed_precision", "fp16"]
    known = (
        f", which compute capability {capability:.1f} has"
        if written == "bf16" and capability is not None and capability >= BF16_FROM
        else ""
    )
    return written, f"as {config.name} says{known}", []


def capability() -> float | None:
    """Lowest compute capability of the visible GPUs, read from nvidia-smi without torch. None where nvidia-smi does not report it."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    only = [] if visible is None else [f"--id={visible}"]
    printed = processes.nvidia_smi(*only, "--query-gpu=compute_cap", "--format=csv,noheader")
    try:
        return min((float(line) for line in printed.split()), default=None)
    except ValueError:  # an old driver prints [N/A], or an error for the unknown field
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


TARGET = Target("[--accelerate NAME] [--processes N] -- train RECIPE …     on this machine: all GPUs, or the CPU", main)
