"""A private Slurm on one machine: a controller, two nodes that can fail, and its own munge."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from conftest import ROOT
from ports import free_ports
from ranks import read

CONF = """
ClusterName=iddpm
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldParameters=preempt_send_user_signal
SlurmdParameters=config_overrides
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=2
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=1
MinJobAge=3600
KillWait=5
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 Gres=gpu:8
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 Gres=gpu:8
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=urgent Nodes=node1,node2 PriorityTier=10
"""


class Slurm:
    """Runs commands with `env`; logs are in `folder`. The two nodes claim to have 64 CPUs and 8 GPUs each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/usr/bin",
            "OMP_NUM_THREADS": "1",
            # The nodes' names are in no DNS; real ones are, and need no MASTER_ADDR.
            "MASTER_ADDR": "127.0.0.1",
        }
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def run(self, *command: str, timeout: float = 60) -> str:
        """Return a command's stdout; raises CalledProcessError with the output if it fails."""
        return subprocess.run(
            command, cwd=ROOT, env=self.env, capture_output=True, text=True, check=True, timeout=timeout
        ).stdout

    def job(self, job: str) -> dict[str, str]:
        """Return a job's fields, such as JobState and Restarts, even after it has ended."""
        text = self.run("scontrol", "show", "--oneliner", "job", job).splitlines()[0]
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def processes(self) -> dict[int, dict[str, str]]:
        """Return the process ids, with environments, of everything this Slurm runs or has left behind."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):  # ended meanwhile
                pairs = (process / "environ").read_bytes().decode(errors="replace").split("\0")
                variables = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
                if variables.get("SLURM_CONF") == self.env["SLURM_CONF"]:
                    found[int(process.name)] = variables
        return found

    def tasks(self, job: str, node: str = "") -> list[int]:
        """Return the process ids of what srun has started for a job (or an array), on this node or on both."""
        return [
            pid
            for pid, variables in self.processes().items()
            if "SLURM_STEP_ID" in variables
            and job in (variables.get("SLURM_JOB_ID"), variables.get("SLURM_ARRAY_JOB_ID"))
            and node in ("", variables.get("SLURMD_NODENAME"))
        ]

    def start(self, name: str, *command: str) -> None:
        program = shutil.which(command[0], path=self.env["PATH"])
        assert program
        with (self.folder / f"{name}-out.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen([program, *command[1:]], env=self.env, stdout=log, stderr=log)

    def lose(self, node: str, job: str) -> None:
        """Simulate a power failure of the node: its daemon, slurmstepd and tasks die at once."""
        daemon = self.daemons[node]
        tasks = self.tasks(job, node)
        shepherds = {int(read(f"/proc/{pid}/stat").rpartition(")")[2].split()[1]) for pid in tasks}
        for pid in [daemon.pid, *(pid for pid in shepherds if "slurmstepd" in read(f"/proc/{pid}/cmdline")), *tasks]:
            os.kill(pid, signal.SIGKILL)
        daemon.wait()

    def boot(self, node: str) -> None:
        """Bring the node back, as after a reboot not requested by Slurm, and resume it as an administrator would."""
        self.start(node, "slurmd", "-D", "-b", "-N", node)
        self.until(lambda: "DOWN" in self.run("scontrol", "show", "node", node), "a node that is down")
        # From here on it reports the machine's boot: with `-b`, a difference of a second would look like a reboot.
        self.daemons[node].terminate()
        self.daemons[node].wait()
        self.start(node, "slurmd", "-D", "-N", node)
        self.run("scontrol", "update", f"NodeName={node}", "State=RESUME")

    def until(self, true: Callable[[], bool], what: str, seconds: float = 240) -> None:
        deadline = time.monotonic() + seconds
        while not true():
            assert time.monotonic() < deadline, f"no {what} after {seconds} s\n{self.logs()}"
            time.sleep(0.05)

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))


@contextlib.contextmanager
def private_slurm(folder: Path) -> Iterator[Slurm]:
    """Start Slurm in `folder`, wait until both nodes are idle, and stop it at the end."""
    slurm = Slurm(folder)
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    ports = free_ports(3)
    conf = CONF.format(host=socket.gethostname().split(".")[0], folder=folder, ports=ports)
    (folder / "slurm.conf").write_text(conf)
    for number in range(8):  # Slurm allocates them as if they were GPUs
        (folder / f"gpu{number}").symlink_to("/dev/null")
    (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-7]\n")

    munge = [f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
    munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    try:
        slurm.start("munged", "munged", "--foreground", "--force", *munge)
        slurm.until((folder / "munge.socket").exists, "munged's socket")
        slurm.start("slurmctld", "slurmctld", "-D", "-c")
        for node in ("node1", "node2"):
            slurm.start(node, "slurmd", "-D", "-N", node)
        slurm.until(lambda: _idle(slurm) == 2, "two idle nodes")
        yield slurm
    finally:
        for daemon in reversed(slurm.daemons.values()):
            daemon.terminate()
        for daemon in slurm.daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
            daemon.kill()
        for pid in slurm.processes():  # a slurmstepd that is still trying to reach the controller
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _idle(slurm: Slurm) -> int:
    try:
        return slurm.run("sinfo", "--noheader", "-N", "-p", "main", "-o", "%T").split().count("idle")
    except subprocess.CalledProcessError:
        return 0
