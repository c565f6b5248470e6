"""A private Slurm on one machine: one controller, two nodes, its own munge. Ended by its own process ids."""

import contextlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

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
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CryptoType=crypto/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=5
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
ReturnToService=2
MinJobAge=3600
KillWait=5
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""


class Slurm:
    """Commands run with `env`; `folder` has the logs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = os.environ | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": f"{os.environ['PATH']}:/usr/sbin:/usr/bin",
        }

    def run(self, *command: str, timeout: float = 60) -> str:
        """Its stdout; raises CalledProcessError with the output where it fails."""
        return subprocess.run(command, env=self.env, capture_output=True, text=True, check=True, timeout=timeout).stdout

    def logs(self) -> str:
        return "\n".join(f"== {path.name}\n{path.read_text()[-2000:]}" for path in self.folder.glob("*.log"))


@contextlib.contextmanager
def private_slurm(folder: Path) -> Iterator[Slurm]:
    """Start it in `folder`, wait until both nodes are idle, and end it."""
    slurm = Slurm(folder)
    folder.chmod(0o755)
    (folder / "state").mkdir()
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    ports = [_free_port() for _ in range(3)]
    conf = CONF.format(host=socket.gethostname().split(".")[0], folder=folder, ports=ports)
    (folder / "slurm.conf").write_text(conf)

    munge = [f"--key-file={key}", f"--socket={folder}/munge.socket", f"--pid-file={folder}/munge.pid"]
    munge += [f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    daemons = [
        ["munged", "--foreground", "--force", *munge],
        ["slurmctld", "-D", "-c"],
        *(["slurmd", "-D", "-N", node] for node in ("node1", "node2")),
    ]
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for daemon in daemons:
            program = shutil.which(daemon[0], path=slurm.env["PATH"])
            assert program
            with (folder / f"{daemon[0]}-out.log").open("ab") as log:
                process = subprocess.Popen([program, *daemon[1:]], env=slurm.env, stdout=log, stderr=log)
            processes.append(process)
            if daemon[0] == "munged":
                _until(lambda: (folder / "munge.socket").exists(), slurm, "munged's socket")
        _until(lambda: _idle(slurm) == 2, slurm, "two idle nodes")
        yield slurm
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()


def _idle(slurm: Slurm) -> int:
    try:
        return slurm.run("sinfo", "--noheader", "-N", "-o", "%T").split().count("idle")
    except subprocess.CalledProcessError:
        return 0


def _until(true: Callable[[], bool], slurm: Slurm, what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"no {what} after {seconds} s\n{slurm.logs()}"
        time.sleep(0.2)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])
