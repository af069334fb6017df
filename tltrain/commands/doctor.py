"""`tltrain doctor`: checks the hardware, the software and communication between processes, and prints a remedy for each problem."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from tltrain import __version__
from tltrain.core import files
from tltrain.core.errors import Parser
from tltrain.core.output import wrapping

GIB = 1024**3
LEAST_SHARED_GIB, LEAST_DISK_GIB, LEAST_MEMORY_GIB = 1, 5, 4
MARK = {"ok": "ok  ", "note": "note", "problem": "BAD "}

PAIR = """\
import sys, datetime, torch, torch.distributed as dist
rank, backend, meeting = int(sys.argv[1]), sys.argv[2], sys.argv[3]
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(backend, init_method="file://" + meeting, rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60))
total = torch.ones(1, device=device) * (rank + 1)
dist.all_reduce(total)
assert total.item() == 3, total
dist.destroy_process_group()
"""


@dataclass(frozen=True)
class Finding:
    """Result of one check: ok, a note, or a problem with its remedy."""

    level: Literal["ok", "note", "problem"]
    name: str
    text: str
    remedy: str = ""


def doctor(argv: Sequence[str]) -> int:
    """Look at this machine: GPUs, memory, disk, network of processes, Slurm, keys and caches, with a remedy for each problem."""
    epilog = "With a source, such as a folder of images, it looks at those instead: tltrain doctor SOURCE --help"
    parser = Parser(prog="tltrain doctor", description=doctor.__doc__, epilog=epilog)
    parser.add_argument("--folder", type=Path, default=Path("runs"), help="where runs will stand (default: runs)")
    folder = parser.parse_args(argv).folder
    checks: list[Callable[[], list[Finding]]] = [versions, gpus, memory, lambda: disk(folder), pair, slurm, wandb_key, hub_cache]
    findings: list[Finding] = []
    for check in checks:
        for finding in check():
            findings.append(finding)
            wrapping.say(f"{MARK[finding.level]}  {finding.name:10}  {finding.text}")
            if finding.remedy:
                wrapping.say(f"{'':18}{finding.remedy}")
    problems = sum(finding.level == "problem" for finding in findings)
    print(f"\n{verdict(findings)}" if not problems else f"\n{problems} problem{'s' * (problems > 1)}; the remedies stand above")
    return 1 if problems else 0


def verdict(findings: Sequence[Finding]) -> str:
    """One sentence on where this machine can train, for a machine without problems."""
    num_gpus = sum(finding.name.startswith("gpu") and finding.level == "ok" for finding in findings)
    where = {0: "on its CPU", 1: "on one GPU"}.get(num_gpus, f"on {num_gpus} GPUs")
    cluster = any(finding.name == "slurm" and finding.level == "ok" for finding in findings)
    return f"This machine can train {where}" + (
        ", and submit to a Slurm cluster: tltrain launch slurm" if cluster else ": tltrain launch local"
    )


def versions() -> list[Finding]:
    names = ("torch", "torchvision", "transformers", "accelerate", "numpy")
    listed = ", ".join(f"{name} {version(name)}" for name in names)
    return [Finding("ok", "versions", f"tltrain {__version__}, Python {platform.python_version()}, {listed}")]


def gpus() -> list[Finding]:
    import torch

    driver = _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if not torch.cuda.is_available():
        if driver is None:
            return [Finding("note", "gpus", "none; runs use the CPU")]
        built = torch.version.cuda or "no CUDA at all"
        remedy = "install the PyTorch build for this driver: pytorch.org/get-started; in a container, start it with GPUs (--gpus all, --nv)"
        return [Finding("problem", "gpus", f"driver {driver} is here, but PyTorch (built for {built}) sees no GPU", remedy)]
    findings = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        bf16 = "" if properties.major >= 8 else "; no bf16 units: set mixed_precision to fp16 or no"
        findings.append(Finding("ok", f"gpu {index}", f"{properties.name}, {properties.total_memory / GIB:.0f} GiB{bf16}"))
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None
    text = f"{driver or 'unknown'}, CUDA {torch.version.cuda}, NCCL {nccl or 'missing'}"
    remedy = "several GPUs need NCCL: install a PyTorch build that has it" if nccl is None else ""
    return [*findings, Finding("problem" if remedy and len(findings) > 1 else "ok", "driver", text, remedy)]


def memory() -> list[Finding]:
    from tltrain.core.host.cores import num_cores
    from tltrain.core.host.memory import free_memory, total_memory

    free, total = free_memory() / GIB, total_memory() / GIB
    few = free < LEAST_MEMORY_GIB
    findings = [
        Finding(
            "note" if few else "ok",
            "memory",
            f"{free:.0f} of {total:.0f} GiB free, {num_cores()} processor cores",
            "choose a small --max-device-batch" if few else "",
        )
    ]
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / GIB
        remedy = "data workers pass images through it: start the container with --shm-size=8g, or train with --workers 0"
        low = free < LEAST_SHARED_GIB
        findings.append(Finding("problem" if low else "ok", "/dev/shm", f"{free:.1f} GiB free", remedy if low else ""))
    return findings


def disk(folder: Path) -> list[Finding]:
    """Check free space and an atomic write on the disk of the runs folder, or of its nearest parent that exists."""
    existing = next(path for path in [folder.absolute(), *folder.absolute().parents] if path.exists())
    free = shutil.disk_usage(existing).free / GIB
    findings = []
    low = free < LEAST_DISK_GIB
    remedy = "a checkpoint of a large network takes more than 1 GiB: make room, or choose another disk with --folder" if low else ""
    findings.append(Finding("problem" if low else "ok", "disk", f"{free:.0f} GiB free at {existing}", remedy))
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".tltrain-doctor-") as scratch:
            files.write_atomic(Path(scratch) / "whole", b"whole")
    except OSError as error:
        findings.append(Finding("problem", "disk", f"{existing} cannot be written: {error}", "choose another folder with --folder"))
    return findings


def pair() -> list[Finding]:
    """Check communication: two processes all-reduce a number, as every distributed run does at each step."""
    import torch

    backends = ["gloo"]
    if torch.cuda.is_available() and torch.cuda.device_count() > 1:
        backends.append("nccl")
    return [add_up(backend) for backend in backends]


def add_up(backend: str, python: str = sys.executable, seconds: float = 120) -> Finding:
    """Start two processes that all-reduce a number by this backend. seconds: how long they may take."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [python, "-c", PAIR]
        both = [
            subprocess.Popen(
                [*command, str(rank), backend, f"{scratch}/meeting"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            for rank in range(2)
        ]
        problem = ""
        for process in both:
            with process:
                try:
                    output, _ = process.communicate(timeout=seconds)
                except subprocess.TimeoutExpired:
                    process.kill()
                    output = ""
                    problem = problem or f"no answer within {seconds:.0f} s"
            if process.returncode != 0:
                problem = problem or (output.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    if not problem:
        return Finding("ok", "processes", f"two processes work together by {backend}")
    remedies = {
        "gloo": "name the network to use, such as GLOO_SOCKET_IFNAME=eth0, and look whether a firewall parts processes of this machine",
        "nccl": "look at the output with NCCL_DEBUG=INFO; NCCL_P2P_DISABLE=1 tells whether the link between the GPUs is at fault",
    }
    return Finding("problem", "processes", f"two processes do not work together by {backend}: {problem}", remedies[backend])


def slurm() -> list[Finding]:
    slurm_version = _first_line("sbatch", "--version")
    if slurm_version is None:
        return [Finding("note", "slurm", "no sbatch here: runs start on this machine, by tltrain launch local")]
    nodes = _first_line("sinfo", "--noheader", "--format", "%D nodes, partitions %R")
    if nodes is None:
        remedy = "this machine is no submit host (SLURM_CONF?), or the controller is down; log in where sinfo answers"
        return [Finding("note", "slurm", f"{slurm_version}, and sinfo does not answer", remedy)]
    return [Finding("ok", "slurm", f"{slurm_version}, {nodes}")]


def wandb_key() -> list[Finding]:
    from tltrain.runs.trackers.wandb import has_key

    if has_key():
        return [Finding("ok", "wandb", "a key is here: --wandb online mirrors the metrics")]
    return [
        Finding("note", "wandb", "no key: metrics stay in the run folder; `wandb login` or WANDB_API_KEY, and --wandb online, mirror them")
    ]


def hub_cache() -> list[Finding]:
    """List the pretrained weights in the local caches. Compute nodes often have no network to download others."""
    from huggingface_hub import constants

    hub = Path(constants.HF_HUB_CACHE)
    models = sorted(path.name[len("models--") :].replace("--", "/") for path in hub.glob("models--*"))
    home = Path(os.environ.get("TORCH_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "torch")
    torch_files = sorted(path.name for path in (home / "hub" / "checkpoints").glob("*.pth"))
    if not models and not torch_files:
        text = f"no pretrained weights at {hub} or {home}; they are loaded at the first use, where there is a network"
        return [Finding("note", "weights", text)]
    listed = ", ".join([*models, *torch_files][:6]) + (", …" if len(models) + len(torch_files) > 6 else "")
    return [Finding("ok", "weights", f"{len(models)} models at {hub}, {len(torch_files)} files at {home}: {listed}")]


def _first_line(*command: str) -> str | None:
    """The first line of a command's output. None where the command is missing, fails or prints nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0].strip() if done.returncode == 0 and lines else None
