"""A real Slurm with several nodes on one machine.

Every node has its own network, host name, mounts, processes and /dev/shm, by Linux namespaces: it can crash, be cut off and boot
again without the others. Nothing is added to the machine's own network. Needs root, Linux and Debian's slurmctld, slurmd,
slurm-client and iproute2.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare")
FREEZER = Path("/sys/fs/cgroup/freezer")
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}

CONFIG = """\
ClusterName=tltrain
SlurmctldHost=ctl({subnet}.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
CredType=cred/none
AuthInfo=cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool-%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
MailProg=/bin/true
ProctrackType=proctrack/{proctrack}
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
SlurmdParameters=config_overrides
GresTypes=gpu
ReturnToService=2
JobRequeue=1
KillWait=20
SlurmdTimeout=10
MessageTimeout=5
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=sched_interval=2,bf_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/filetxt
JobCompLoc={root}/log/jobcomp.txt
NodeName={nodes} NodeAddr={subnet}.[11-{last}] CPUs=16 Boards=1 SocketsPerBoard=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=256000 \
Gres=gpu:h100:8 Feature=fast State=UNKNOWN
PartitionName=test Nodes={nodes} Default=YES MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=spot Nodes={nodes} MaxTime=INFINITE PriorityTier=1 PreemptMode=REQUEUE GraceTime=40 State=UP
"""


def missing() -> str | None:
    """Why no cluster can be started here, or None."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "a Slurm cluster of namespaces needs root on Linux"
    absent = [tool for tool in TOOLS if shutil.which(tool) is None]
    if absent:
        return f"{', '.join(absent)} not found: apt-get install --no-install-recommends slurmctld slurmd slurm-client iproute2"
    command = ["unshare", "--net", "--uts", "--mount", "--pid", "--fork", "--mount-proc", "true"]
    probe = subprocess.run(command, capture_output=True, check=False)
    return None if probe.returncode == 0 else f"namespaces are refused here: {probe.stderr.decode().strip()}"


class Cluster:
    """N nodes n1 to nN and a controller host ctl. One cluster at a time on a machine: others wait for its lock."""

    def __init__(self, root: Path, num_nodes: int, prefix: str = "tlt", subnet: str = "10.77.0") -> None:
        self.root, self.num_nodes, self.prefix, self.subnet = root, num_nodes, prefix, subnet
        self.names = [f"n{i}" for i in range(1, num_nodes + 1)]
        self.hosts: dict[str, subprocess.Popen[bytes]] = {}
        self.lock: IO[str] | None = None
        self.cgroup = os.access(FREEZER / "cgroup.procs", os.W_OK)
        own = {"SLURM_CONF": f"{root}/slurm.conf", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "NETRC": os.devnull}
        own |= {"TLTRAIN_CACHE": f"{root}/cache", "TLTRAIN_DATA": f"{root}/data", "XDG_CONFIG_HOME": f"{root}/config"}
        foreign = ("SLURM_", "SBATCH_", "WANDB_", "TLTRAIN_")  # neither a surrounding job's settings nor anybody's keys
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith(foreign)} | own

    def up(self) -> None:
        """Start the controller and all nodes, and wait until they are idle. Takes about a second."""
        self.lock = (Path(tempfile.gettempdir()) / "tltrain-slurm-tests.lock").open("w")
        fcntl.flock(self.lock, fcntl.LOCK_EX)
        self._remove_traces()
        self._write_files()
        self._lay_network()
        self._start_host("ctl", "exec slurmctld -D -c")
        for name in self.names:
            self.boot(name)
        self.wait_idle(20)

    def down(self) -> None:
        """Stop everything and leave no trace but the files under root."""
        for name in list(self.hosts):
            self.crash(name)
        self._remove_traces()
        if self.lock is not None:
            self.lock.close()
            self.lock = None

    def boot(self, name: str) -> None:
        """Start a node, for the first time or after a crash."""
        (self.root / f"spool-{name}").mkdir(exist_ok=True)
        self._start_host(name, "mount -t tmpfs tmpfs /dev/shm; slurmd -D & while :; do sleep 3600 & wait; done")

    def crash(self, name: str) -> None:
        """Kill a node with every process on it, at once."""
        host = self.hosts.pop(name)
        os.killpg(host.pid, signal.SIGKILL)  # unshare --kill-child takes the process namespace with it
        host.wait()

    def unplug(self, name: str) -> None:
        """Cut a node's link; its processes go on."""
        self._ip("-n", f"{self.prefix}ctl", "link", "set", f"v{name[1:]}", "down")

    def plug(self, name: str) -> None:
        self._ip("-n", f"{self.prefix}ctl", "link", "set", f"v{name[1:]}", "up")

    def inside(
        self, name: str, *command: str, cwd: Path | None = None, check: bool = True, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on a host of the cluster."""
        env = {**self.environment, **environment}
        done = subprocess.run([*self._enter(name, cwd or self.root), *command], env=env, capture_output=True, text=True, check=False)
        if check and done.returncode != 0:
            raise AssertionError(f"{command} on {name} ended with {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def slurm(self, *command: str, cwd: Path | None = None, check: bool = True, **environment: str) -> str:
        """Run a command on the controller and return what it prints."""
        return self.inside("ctl", *command, cwd=cwd, check=check, **environment).stdout

    def python(self, *arguments: str, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run this Python on the controller, as a user on a login node does."""
        return self.inside("ctl", sys.executable, *arguments, cwd=cwd, check=check, **environment)

    def fields(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of a job."""
        text = self.slurm("scontrol", "--oneliner", "show", "job", job, check=False)
        return dict(re.findall(r"(\S+?)=(\S*)", text))

    def state(self, job: str) -> str:
        return self.fields(job).get("JobState", "")

    def wait(self, job: str, seconds: float = 120) -> dict[str, str]:
        """Wait until a job has ended for good, and return its fields."""
        self.wait_until(lambda: self.state(job) in ENDED, seconds, f"job {job} ended")
        return self.fields(job)

    def wait_state(self, job: str, state: str, seconds: float = 60) -> None:
        self.wait_until(lambda: self.state(job) == state, seconds, f"job {job} {state}")

    def wait_until(self, holds: Callable[[], object], seconds: float, what: str) -> None:
        end = time.monotonic() + seconds
        while not holds():
            if time.monotonic() > end:
                queue, nodes = self.slurm("squeue", check=False), self.slurm("sinfo", check=False)
                raise AssertionError(f"{what}: not within {seconds:.0f} s\n{queue}{nodes}")
            time.sleep(0.1)

    def wait_idle(self, seconds: float = 60) -> None:
        """Wait until every node is up and free."""
        idle = f"{self.num_nodes} idle"
        self.wait_until(
            lambda: self.slurm("sinfo", "-h", "-p", "test", "-o", "%D %T", check=False).strip() == idle, seconds, "all nodes idle"
        )

    def processes(self, name: str, pattern: str) -> list[int]:
        """Processes on a node whose command line contains a text, by the node's own numbers."""
        done = self.inside(name, "pgrep", "-f", "--", pattern, check=False)
        return [int(pid) for pid in done.stdout.split()]

    def _enter(self, name: str, cwd: Path) -> list[str]:
        host = self.hosts[name].pid
        children = Path(f"/proc/{host}/task/{host}/children").read_text().split()
        names = ["-n", "-u", "-m"] + (["-p"] if name != "ctl" else [])
        return ["nsenter", "-t", str(host if name == "ctl" else children[0]), *names, f"--wd={cwd}", "--"]

    def _start_host(self, name: str, script: str) -> None:
        own = ["--pid", "--fork", "--kill-child", "--mount-proc"] if name != "ctl" else []
        prepare = f"mount --bind {self.root}/hosts /etc/hosts; hostname {name}; "
        command = ["nsenter", f"--net=/run/netns/{self.prefix}{name}", "unshare", "--uts", "--mount", *own, "sh", "-c", prepare + script]
        with (self.root / "log" / f"{name}.out").open("ab") as log:
            self.hosts[name] = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        if name != "ctl":
            pid = self.hosts[name].pid
            self.wait_until(lambda: Path(f"/proc/{pid}/task/{pid}/children").read_text().split(), 10, f"{name} boots")

    def _write_files(self) -> None:
        for folder in ("state", "log", "run", "dev"):
            (self.root / folder).mkdir(parents=True, exist_ok=True)
        nodes, last = f"n[1-{self.num_nodes}]", 10 + self.num_nodes
        for i in range(8):  # Slurm wants device files for GPUs; any character device will do
            device = self.root / "dev" / f"nvidia{i}"
            if not device.exists():
                os.mknod(device, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        hosts = ["127.0.0.1 localhost", f"{self.subnet}.1 ctl"] + [f"{self.subnet}.{10 + i} n{i}" for i in range(1, self.num_nodes + 1)]
        proctrack = "cgroup" if self.cgroup else "linuxproc"
        cgroup = "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\nConstrainCores=no\nConstrainRAMSpace=no\n"
        config = CONFIG.format(subnet=self.subnet, root=self.root, nodes=nodes, last=last, proctrack=proctrack)
        (self.root / "hosts").write_text("\n".join(hosts) + "\n")
        (self.root / "gres.conf").write_text(f"NodeName={nodes} Name=gpu Type=h100 File={self.root}/dev/nvidia[0-7]\n")
        (self.root / "cgroup.conf").write_text(cgroup)
        (self.root / "slurm.conf").write_text(config)

    def _lay_network(self) -> None:
        control = f"{self.prefix}ctl"
        self._ip("netns", "add", control)
        self._ip("-n", control, "link", "set", "lo", "up")
        self._ip("-n", control, "link", "add", "br0", "type", "bridge")
        self._ip("-n", control, "addr", "add", f"{self.subnet}.1/24", "dev", "br0")
        self._ip("-n", control, "link", "set", "br0", "up")
        for i, name in enumerate(self.names, start=1):
            space = f"{self.prefix}{name}"
            self._ip("netns", "add", space)
            self._ip("-n", control, "link", "add", f"v{i}", "type", "veth", "peer", "name", "eth0", "netns", space)
            self._ip("-n", control, "link", "set", f"v{i}", "master", "br0", "up")
            self._ip("-n", space, "link", "set", "lo", "up")
            self._ip("-n", space, "addr", "add", f"{self.subnet}.{10 + i}/24", "dev", "eth0")
            self._ip("-n", space, "link", "set", "eth0", "up")

    def _remove_traces(self) -> None:
        listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
        for space in re.findall(rf"^({self.prefix}(?:ctl|n\d+))\b", listed, re.MULTILINE):
            self._ip("netns", "del", space)
        time.sleep(0.1)  # processes just killed leave their groups
        for folder in FREEZER.glob("slurm_n[0-9]*"):
            for inner in [*sorted((p for p in folder.rglob("*") if p.is_dir()), reverse=True), folder]:
                with contextlib.suppress(OSError):  # still not left; the next cluster takes the group over
                    inner.rmdir()

    def _ip(self, *arguments: str) -> None:
        subprocess.run(["ip", *arguments], check=True, capture_output=True)


@contextlib.contextmanager
def running(root: Path, num_nodes: int) -> Iterator[Cluster]:
    """A cluster that is up inside the block."""
    cluster = Cluster(root, num_nodes)
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()
