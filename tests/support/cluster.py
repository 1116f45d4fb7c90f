"""A Slurm of two nodes with eight GPUs each, on this machine: the real controller, node daemons and munge, as root.

`python tests/support/cluster.py DIR` starts one in DIR, prints the SLURM_CONF that its commands need, and stops it on
Ctrl-C. Everything is in DIR and on local ports: a Slurm of the machine itself is left alone. The GPUs are empty files.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "scontrol")
MISSING = [program for program in PROGRAMS if not shutil.which(program)]

CONFIGURATION = """
ClusterName=ist
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# How soon a requeued job may start depends on it: 120 s by default, 5 at the least.
AuthInfo=socket={folder}/munge/socket,cred_expire=5
MpiDefault=none
MailProg=/bin/true
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=0
ReturnToService=2
JobRequeue=1
KillWait=20
MinJobAge=3600
SlurmdParameters=config_overrides
GresTypes=gpu
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd-%n.log
NodeName=node1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 RealMemory=512000 Gres=gpu:8
NodeName=node2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 RealMemory=512000 Gres=gpu:8
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def until(condition: Callable, what: str, seconds: float = 120, every: float = 0.2):
    """The first true value of `condition()`; fails when none comes within `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(every)
    return value


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on at this moment."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


class Cluster:
    """A running Slurm; `environment` is what its commands and jobs see, and nothing of this process's besides."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("state", "munge", "log", "dev"):
            (folder / name).mkdir(parents=True)
        (folder / "munge").chmod(0o711)  # munged wants to be reachable by all
        (folder / "munge/key").write_bytes(os.urandom(1024))
        (folder / "munge/key").chmod(0o600)
        for i in range(8):
            (folder / f"dev/gpu{i}").touch()
        (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, ports=free_ports(3)))
        (folder / "gres.conf").write_text(f"NodeName=node[1-2] Name=gpu File={folder}/dev/gpu[0-7]\n")
        self.environment = {
            **{"PATH": os.environ["PATH"], "HOME": os.environ.get("HOME", "/root"), "LANG": "C.UTF-8"},
            **{"SLURM_CONF": str(folder / "slurm.conf")},
        }

    def start(self) -> "Cluster":
        munge = self.folder / "munge"
        options = [f"--{name}-file={munge}/{name}" for name in ("key", "pid", "log", "seed")]
        self.run("munged", "--force", f"--socket={munge}/socket", "--num-threads=10", *options)
        self.run("slurmctld")
        for node in ("node1", "node2"):
            self.run("slurmd", "-N", node)
        until(lambda: self.run("sinfo", "-h", "-N", "-o", "%t").split() == ["idle"] * 2, "both nodes are idle", 30)
        return self

    def stop(self) -> None:
        """End jobs, then the daemons."""
        self.run("scancel", "--state=RUNNING", "--full", "--signal=KILL", check=False)
        self.run("scancel", "--user=root", check=False)
        time.sleep(1)
        files = [*self.folder.glob("slurm*.pid"), self.folder / "munge/pid"]
        pids = [int(file.read_text()) for file in files if file.exists()]
        for number in (signal.SIGTERM, signal.SIGKILL):  # a daemon may wait for a step that does not end
            for pid in filter(alive, pids):
                os.kill(pid, number)
            deadline = time.monotonic() + 20
            while any(map(alive, pids)) and time.monotonic() < deadline:
                time.sleep(0.1)

    def run(self, *command: object, check: bool = True, **options) -> str:
        done = subprocess.run(
            [str(part) for part in command], env=self.environment, capture_output=True, text=True, timeout=60, **options
        )
        assert not check or done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def submit(self, *command: object, cwd: Path, **environment: str) -> str:
        """`sbatch` with these arguments: the job's number."""
        assigned = [f"{key}={value}" for key, value in environment.items()]
        return self.run("env", *assigned, "sbatch", "--parsable", *command, cwd=cwd).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of one job, or of one task of an array (12_3)."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.run("scontrol", "show", "job", job, "--oneliner")))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def until_requeued(self, job: str) -> None:
        """Wait until a job was put back into the queue; it starts again after some 6 to 15 seconds."""
        until(lambda: self.job(job)["Restarts"] != "0", f"job {job} is requeued")

    def until_ended(self, job: str, seconds: float = 180) -> str:
        """Wait until a job has ended for good: its last state."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        return until(lambda: (state := self.state(job)) in ended and state, f"job {job} has ended", seconds)


def alive(pid: int) -> bool:
    """Whether a process runs; one that has ended but is not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    cluster = Cluster(Path(sys.argv[1]).absolute()).start()
    print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
    try:
        signal.pause()
    except KeyboardInterrupt:
        cluster.stop()
