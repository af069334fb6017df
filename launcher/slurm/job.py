"""The Job type: resources and limits of a Slurm job. Pure functions turn it into sbatch options and bash settings."""

from __future__ import annotations

import re
from dataclasses import dataclass

from launcher import shell
from tltrain.core.errors import UserError

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]*(,[A-Za-z0-9][A-Za-z0-9_.@+-]*)*")
PATTERNS = {
    "memory": (re.compile(r"[1-9][0-9]*[KMGT]?"), "a number with K, M, G or T behind it, such as 64G"),
    "time": (re.compile(r"[0-9]+|([0-9]+-)?[0-9]+(:[0-9]{1,2}){1,2}|[0-9]+-[0-9]+"), "minutes, H:MM:SS or D-HH:MM:SS, such as 4:00:00"),
    "partition": (NAME, "a name, or several with commas between them"),
    "account": (NAME, "a name"),
    "qos": (NAME, "a name"),
    "constraint": (re.compile(r"[A-Za-z0-9_.|&*()\[\]:,=+-]+"), "features of nodes with & or | between them"),
    "dependency": (re.compile(r"[a-z]+(:[0-9_+*]+)*([,?][a-z]+(:[0-9_+*]+)*)*"), "such as afterok:1234"),
    "name": (re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+=-]*"), "letters, digits and . _ - + = @"),
    "array": (
        re.compile(r"[A-Za-z][A-Za-z0-9_.-]*=[A-Za-z0-9+-][A-Za-z0-9_.+-]*(,[A-Za-z0-9+-][A-Za-z0-9_.+-]*)*"),
        "a setting and its values, such as seed=0,1,2",
    ),
}
LEAST = {
    "nodes": 1, "gpus_per_node": 0, "processes_per_node": 1, "cpus": 1, "signal_s": 1, "max_requeues": 0, "max_crash_requeues": 0,
}  # fmt: skip


@dataclass(frozen=True)
class Job:
    """The resources and limits of a Slurm job. Site defaults come from the user's configuration folder."""

    nodes: int = 1
    """Number of nodes."""
    gpus_per_node: int = 1
    """GPUs on each node, one process each; 0 trains on the CPU."""
    processes_per_node: int | None = None
    """Processes on each node; the default is one for each GPU, or one."""
    cpus: int | None = None
    """Processor cores on each node; the default is 8 for each process."""
    memory: str | None = None
    """Memory on each node, such as 64G; the default is the site's."""
    time: str | None = "12:00:00"
    """Time limit. The run is saved ahead of it, and requeued until it is finished."""
    partition: str | None = None
    """Partition."""
    account: str | None = None
    """Account that pays."""
    qos: str | None = None
    """Quality of service."""
    constraint: str | None = None
    """Features that the nodes must have, such as a100|h100."""
    dependency: str | None = None
    """Start only after other jobs, such as afterok:1234; the job is killed if that can never come true."""
    array: str | None = None
    """One run for each value of a setting, such as seed=0,1,2 or stages.1.lr=1e-3,3e-4."""
    name: str | None = None
    """Name in the queue; the default is the recipe's."""
    setup: tuple[str, ...] = ()
    """Lines of bash before the run, such as 'module load cuda'."""
    container: str | None = None
    """Command in front of python, such as 'apptainer exec --nv image.sif'."""
    accelerate: str | None = None
    """How the run is spread: ddp, fsdp2, zero2, zero3, one_gpu, cpu, or a file of accelerate; the default follows from the GPUs."""
    signal_s: int = 120
    """Seconds before the time limit at which the run is told to save. Slurm looks every 30 s; a save must fit in."""
    max_requeues: int = 50
    """How often the job is requeued after a preemption or its time limit, in all."""
    max_crash_requeues: int = 0
    """How often the job is requeued after a crash."""

    def __post_init__(self) -> None:
        for field, least in LEAST.items():
            value = getattr(self, field)
            if value is not None and value < least:
                raise UserError(f"--{_flag(field)} is {value}; it must be at least {least}")
        for field, (pattern, rule) in PATTERNS.items():
            value = getattr(self, field)
            if value is not None and pattern.fullmatch(value) is None:
                raise UserError(f"--{_flag(field)} is {value!r}; it must be {rule}")
        if self.time is not None and seconds(self.time) < 2 * self.signal_s:
            rule = "the run would be told to stop as it starts; raise --time, or lower --signal-s"
            raise UserError(f"--time is {self.time} and --signal-s {self.signal_s}: {rule}")
        for line in self.setup:
            if not line.isprintable() or line.endswith("\\"):
                raise UserError(f"--setup has {line!r}; each must be one whole line of bash: give several lines as several words")
        if self.gpus_per_node == 0 and self.accelerate not in (None, "cpu") and "/" not in str(self.accelerate):
            raise UserError(f"--accelerate is {self.accelerate} and --gpus-per-node 0; without GPUs choose cpu, or leave it out")
        if self.array is not None and len(set(self.array_values)) < len(self.array_values):
            raise UserError(f"--array is {self.array}; each value may stand once, since each has its own run folder")
        self.container_argv  # noqa: B018  refuses a command with an open quote

    @property
    def processes_here(self) -> int:
        """Processes on each node."""
        return self.processes_per_node or max(1, self.gpus_per_node)

    @property
    def array_key(self) -> str:
        return (self.array or "").partition("=")[0]

    @property
    def array_values(self) -> tuple[str, ...]:
        """One value for each run of the array. Empty where the job is no array."""
        return tuple(self.array.partition("=")[2].split(",")) if self.array else ()

    @property
    def container_argv(self) -> tuple[str, ...]:
        return _split(self.container) if self.container else ()


def sbatch_arguments(job: Job, name: str, log: str) -> list[str]:
    """Options for sbatch. `name` is the job's name in the queue unless the job sets its own. `log` is Slurm's pattern for the log file."""
    options = {
        "job-name": job.name or name, "nodes": job.nodes, "ntasks-per-node": 1, "cpus-per-task": job.cpus or 8 * job.processes_here,
        "gpus-per-node": job.gpus_per_node or None, "mem": job.memory, "time": job.time, "partition": job.partition,
        "account": job.account, "qos": job.qos, "constraint": job.constraint, "dependency": job.dependency,
        "array": f"0-{len(job.array_values) - 1}" if job.array else None,
        "signal": f"B:USR2@{job.signal_s}", "open-mode": "append", "output": log,
    }  # fmt: skip
    arguments = [f"--{key}={value}" for key, value in options.items() if value is not None]
    return [*arguments, "--requeue", *(["--kill-on-invalid-dep=yes"] if job.dependency else [])]


def seconds(time: str) -> int:
    """Seconds of a time limit in one of Slurm's formats: minutes, M:S, H:M:S, D-H, D-H:M, D-H:M:S."""
    days, _, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    units = (3600, 60, 1) if days or len(parts) == 3 else (60, 1)
    return 86400 * int(days or 0) + sum(part * unit for part, unit in zip(parts, units, strict=False))


def header(arguments: list[str]) -> str:
    """sbatch options as #SBATCH lines."""
    return "".join(f"#SBATCH {_directive(argument)}\n" for argument in arguments)


def settings(job: Job, python: str, argv: list[str]) -> str:
    """The bash settings of the job script. `argv`, quoted for bash, becomes its arguments where it is started without any."""
    lines = [
        *job.setup,
        shell.array("python", [*job.container_argv, python]),
        f"accelerate={shell.quote(job.accelerate or '')}",
        f"processes_per_node={job.processes_per_node or ''}",
        f"grace_s={job.signal_s}",
        f"max_requeues={job.max_requeues}",
        f"max_crash_requeues={job.max_crash_requeues}",
    ]
    if job.array:
        lines += [shell.array("values", job.array_values), "value=${values[SLURM_ARRAY_TASK_ID]}"]
    lines.append(f"(($#)) || set -- {' '.join(argv)}")
    return "\n".join(lines) + "\n"


def _directive(argument: str) -> str:
    """An option for a #SBATCH line, in quotes where needed: Slurm splits the line at spaces."""
    return argument if re.fullmatch(r"[A-Za-z0-9_.,:;@%+=/|&*()\[\]?-]+", argument) else f'"{argument}"'


def _split(command: str) -> tuple[str, ...]:
    import shlex

    if not command.isprintable():
        raise UserError(f"--container is {command!r}; it must be one line")
    try:
        argv = tuple(shlex.split(command))
    except ValueError as error:
        raise UserError(f"--container is {command!r}: {error}; close the quotes") from error
    if not argv:
        raise UserError(f"--container is {command!r}; leave it out, or give a command")
    return argv


def _flag(field: str) -> str:
    return field.replace("_", "-")
