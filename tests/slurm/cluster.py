"""A real Slurm of two nodes on this machine: munged, slurmctld and two slurmd, of this user."""

from __future__ import annotations

import getpass
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from genac_megatron.platform.network import spare_ports
from tools.slurm_packages import PATH

WAIT_S = 180.0  # for daemons and commands, on a busy machine
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED")
CONF = """\
ClusterName=two
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=15
CryptoType=crypto/munge
SlurmUser={user}
SlurmdUser={user}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=3
ReturnToService=2
MpiDefault=none
JobRequeue=1
KillWait=5
MessageTimeout=60
TCPTimeout=10
BatchStartTimeout=120
UnkillableStepTimeout=300
InactiveLimit=0
MailProg=/bin/true
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=2000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=2000
PartitionName=debug Nodes=ALL Default=YES MaxTime=INFINITE State=UP OverSubscribe=YES
"""


class Cluster:
    """Two nodes, n1 and n2. Its folder must have a short path: a socket's may have 107 characters."""

    conf = (
        ""  # of the cluster that was started last: another's jobs on this machine may have the same numbers
    )

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "GENAC"))},
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": PATH,
        }
        self._daemons: list[subprocess.Popen[bytes]] = []

    def start(self) -> Cluster:
        """Raises AssertionError, with the daemons' logs, where the nodes are not idle in time."""
        (self.folder / "state").mkdir()
        host = socket.gethostname().split(".")[0]
        text = CONF.format(folder=self.folder, host=host, user=getpass.getuser(), ports=spare_ports(3))
        (self.folder / "slurm.conf").write_text(text)
        Cluster.conf = self.environ["SLURM_CONF"]
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        places = [f"--{name}-file={self.folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
        self._daemon("munged", "--foreground", "--force", f"--socket={self.folder}/munge.socket", *places)
        self._until(lambda: (self.folder / "munge.socket").exists(), "munged")
        self._daemon("slurmctld", "-D", "-i")
        for node in ("n1", "n2"):
            (self.folder / f"spool-{node}").mkdir()
            self._daemon("slurmd", "-D", "-N", node)
        self._until(lambda: self.run("sinfo", "-h", "-o", "%T %D").stdout.split() == ["idle", "2"], "sinfo")
        return self

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("ab") as log:
            self._daemons.append(
                subprocess.Popen(
                    command, env=self.environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                    start_new_session=True,
                )
            )  # fmt: skip

    def _until(self, done: object, what: str) -> None:
        give_up = time.monotonic() + WAIT_S
        while not done():  # type: ignore[operator]
            assert time.monotonic() < give_up, f"{what}: {(self.folder / 'daemons.log').read_text()[-3000:]}"
            time.sleep(0.2)

    def stop(self) -> None:
        """End the daemons, in the reverse order."""
        if self._daemons:
            self.run("scancel", "--user", getpass.getuser())
            time.sleep(1.0)
        for daemon in reversed(self._daemons):
            daemon.send_signal(signal.SIGTERM)
            try:
                daemon.wait(15)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def run(self, *command: str, cwd: Path | None = None, **environ: str) -> subprocess.CompletedProcess[str]:
        """A command of Slurm's, with this cluster's configuration."""
        return subprocess.run(
            command, cwd=cwd, env={**self.environ, **environ}, capture_output=True, text=True, timeout=WAIT_S
        )

    def submit(self, *arguments: str, cwd: Path, **environ: str) -> int:
        """sbatch; returns the job's id."""
        done = self.run("sbatch", "--parsable", *arguments, cwd=cwd, **environ)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split(";")[0])

    def job(self, job: int) -> dict[str, str]:
        """The job as scontrol shows it, by field."""
        for _ in range(20):
            done = self.run("scontrol", "--oneliner", "show", "job", str(job))
            if done.returncode == 0 and "JobState=" in done.stdout:
                return dict(word.split("=", 1) for word in done.stdout.split() if "=" in word)
            time.sleep(0.5)  # the controller is busy
        raise AssertionError(f"scontrol show job {job}: {done.stderr}")

    def over(self, job: int) -> str:
        """How a job ended; empty while it has not."""
        seen = self.job(job)
        return f"job {job} is over: {seen['JobState']}, {seen['ExitCode']}" * (seen["JobState"] in ENDED)

    def wait(self, job: int, limit_s: float) -> dict[str, str]:
        """Until the job has ended; raises AssertionError after `limit_s` seconds."""
        give_up = time.monotonic() + limit_s
        while (seen := self.job(job))["JobState"] not in ENDED:
            assert time.monotonic() < give_up, f"job {job} is {seen['JobState']} after {limit_s:.0f} s"
            time.sleep(0.5)
        return seen


def ours(job: int) -> list[str]:
    """Command lines of processes that a job left: those with its id in their environment, zombies apart."""
    found = []
    wanted = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_CONF={Cluster.conf}".encode()}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environ = (folder / "environ").read_bytes().split(b"\0")
            if wanted <= set(environ):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
        except OSError:
            continue
    return found
