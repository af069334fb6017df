"""`python -m launcher.node`: one node's part of a run, as srun starts it, one task a node.

Slurm signals this process alone. It passes signals to the processes that train and waits for their save.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from launcher import accelerate
from launcher.accelerate import World
from launcher.supervise import supervise


def main(argv: list[str]) -> int:
    """Run this node's processes. Returns the exit code for srun: 0, or 1, which makes srun end the other nodes too."""
    parser = argparse.ArgumentParser(prog="python -m launcher.node", description=__doc__)
    parser.add_argument("--notes", type=Path, required=True, help="folder for this job's logs and notes")
    parser.add_argument("--main-node", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--accelerate", default="", help="name or file of the accelerate configuration; empty: what suits")
    parser.add_argument("--grace-s", type=int, default=accelerate.GRACE_S, help="longest save, seconds")
    parser.add_argument("--processes-per-node", default="", help="empty: one for each GPU, or one")
    parser.add_argument("training", nargs=argparse.REMAINDER, help="-- train RECIPE …")
    arguments = parser.parse_args(argv)
    training = arguments.training[1:] if arguments.training[:1] == ["--"] else arguments.training
    rank = int(os.environ["SLURM_NODEID"])
    world = world_of_job(dict(os.environ), arguments.main_node, arguments.port, arguments.processes_per_node)
    config = accelerate.config_file(arguments.accelerate or None, world)
    command = accelerate.arguments(config, world, rank, training)
    log = Log(arguments.notes / f"node-{rank}.log", echo=rank == 0)
    place = f"node {rank} of {world.num_nodes}, {socket.gethostname()}"
    log.say(f"start {os.environ.get('SLURM_RESTART_COUNT', '0')} on {place}; {world.num_processes} processes in all, spread by {config}")
    end = supervise(command, accelerate.environment(world, arguments.notes, arguments.grace_s), log.write)
    log.say(f"processes ended with code {end.code}" + (f" after {', '.join(end.signals)}" if end.signals else ""))
    if end.code != 0:
        _note(arguments.notes, rank, accelerate.explain(end.code, arguments.notes), log.tail())
    return 1 if end.code else 0


def world_of_job(environment: dict[str, str], main_node: str, port: int, per_node: str = "") -> World:
    """The processes of a job, from Slurm's environment variables. `per_node` overrides one process for each GPU."""
    gpus = int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    here = int(per_node) if per_node else max(1, gpus)
    cores = int(environment.get("SLURM_CPUS_PER_TASK") or 1)
    return World(int(environment["SLURM_NNODES"]), here, gpus > 0, max(1, cores // here), main_node, port)


class Log:
    """The log file of a node. With `echo`, as on the first node, everything also goes to the job's log."""

    def __init__(self, path: Path, echo: bool) -> None:
        self.file, self.echo, self.last = path.open("ab", buffering=0), echo, deque[bytes](maxlen=64)

    def write(self, block: bytes) -> None:
        self.last.append(block)
        with suppress(OSError):  # on a full disk go on reading: training would block on a full pipe
            self.file.write(block)
        if self.echo:
            with suppress(OSError):
                os.write(sys.stdout.fileno(), block)

    def say(self, line: str) -> None:
        self.write(f"launch  {line}\n".encode())

    def tail(self, num_lines: int = 40) -> str:
        return "\n".join(b"".join(self.last).decode(errors="replace").splitlines()[-num_lines:])


def _note(folder: Path, rank: int, error: str, tail: str) -> None:
    where = {"node": rank, "host": socket.gethostname(), "time": time.time()}
    note = {**where, "error": error, "traceback": tail}
    (folder / f"node-{rank}.failed.json").write_text(json.dumps(note, indent=1), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
