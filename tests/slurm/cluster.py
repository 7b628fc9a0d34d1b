"""A real Slurm of two nodes on this one machine: network namespaces as hosts, slurmctld in the switch's, one slurmd in
each host's. Everything lies in one temporary folder and ends with the context. Knows nothing of distill.

Two such clusters may run at the same time: namespaces carry the folder's name, addresses and ports are their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.hosts import HOSTS, Hosts, joined

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "ip", "nsenter", "unshare")
CPUS = 2  # of each node, whatever the machine has
START_S = 30.0

# cred_expire: Slurm holds a requeued job back for as long as its old credentials live (two minutes by default)
CONFIGURATION = """\
ClusterName=two
SlurmctldHost=hostS(10.77.0.254)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=16817
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CryptoType=crypto/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
SchedulerType=sched/backfill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=10
MinJobAge=3600
SlurmctldTimeout=30
SlurmdTimeout=20
InactiveLimit=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=2,bf_interval=5
{nodes}
PartitionName=low Nodes=ALL Default=YES MaxTime=01:00:00 State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=5
PartitionName=high Nodes=ALL Default=NO MaxTime=01:00:00 State=UP PriorityTier=10 PreemptMode=OFF
"""


def why_not() -> str | None:
    """Return why there can be no such cluster here, or None where there can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)} (Debian: slurm-wlm munge iproute2)"
    if os.geteuid() != 0:
        return "needs root, for network namespaces and munge"
    probe = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True, check=False
    )
    return f"no namespaces here: {probe.stderr.strip()}" if probe.returncode else None


class Cluster(Hosts):
    """The running cluster as its user sees it: partitions `low` (the default) and `high`, which preempts `low`.

    Job ids are strings, because those of job arrays are ("7_0"). What on() runs needs
    `environment` on top of its own to talk to Slurm.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}

    def run(self, *command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
        """Run one of Slurm's commands where a user would, on hostS; return its standard output."""
        result = subprocess.run(
            self.on("hostS", command),
            cwd=cwd,
            env={**(os.environ if env is None else env), **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
        return result.stdout

    def submit(
        self,
        script: Path,
        *arguments: str,
        cwd: Path,
        options: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> str:
        """Submit a batch script from the folder `cwd`, with sbatch's options before it; return the job's id. `env` is
        the user's environment (the caller's by default), which Slurm hands to the job."""
        printed = self.run("sbatch", "--parsable", *options, str(script), *arguments, cwd=cwd, env=env)
        return printed.strip().split(";")[0]

    def facts(self, job: str) -> dict[str, str]:
        """Return what `scontrol show job` says: JobState, ExitCode, Restarts, Reason, StdOut, ..."""
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait_state(self, job: str, *states: str, timeout_s: float) -> dict[str, str]:
        """Wait until the job is in one of the states, for example COMPLETED or FAILED; return its facts."""
        deadline = time.monotonic() + timeout_s
        while (facts := self.facts(job))["JobState"] not in states:
            waited_for = f"job {job} is {facts['JobState']} ({facts['Reason']}) and not {' or '.join(states)}"
            assert time.monotonic() < deadline, f"{waited_for} after {timeout_s:.0f} s:\n{self.output(job)[-4000:]}"
            time.sleep(0.2)
        return facts

    def output(self, job: str) -> str:
        """Return the log that the user looks at first, slurm-<id>.out, as far as it is written."""
        path = Path(self.facts(job)["StdOut"])
        return path.read_text(errors="replace") if path.exists() else ""

    def requeue(self, job: str) -> None:
        self.run("scontrol", "requeue", job)

    def cancel(self, job: str) -> None:
        self.run("scancel", job)

    def signal_batch(self, job: str, name: str) -> None:
        """Send a signal to the batch script alone, as `#SBATCH --signal=B:...` does before the time limit."""
        self.run("scancel", "--batch", f"--signal={name}", job)


@contextmanager
def cluster() -> Iterator[Cluster]:
    """Start the cluster, wait for its two nodes to be idle, and end everything that was started, whatever happens."""
    with ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="distill-slurm-"))  # short: the path of a socket has its limits
        folder.chmod(0o755)
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        slurm = Cluster(folder)
        _write_files(folder)
        stack.enter_context(joined(slurm))
        _start(slurm, stack)
        stack.callback(_end_jobs, slurm)
        yield slurm


def _write_files(folder: Path) -> None:
    for name in ("state", "spool/hostA", "spool/hostB"):
        (folder / name).mkdir(parents=True)
    nodes = [f"NodeName={h} NodeAddr={a} Port=17001 CPUs={CPUS} RealMemory=4000" for h, a in HOSTS.items()]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, nodes="\n".join(nodes)))
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o400)


def _start(slurm: Cluster, stack: ExitStack) -> None:
    folder = slurm.folder
    files = {"key-file": "munge.key", "socket": "munge.sock", "pid-file": "munged.pid", "seed-file": "munged.seed"}
    munge = [f"--{option}={folder / name}" for option, name in (*files.items(), ("log-file", "munged.log"))]
    _daemon(slurm, stack, "munged", ["munged", "--foreground", "--force", *munge])
    _until((folder / "munge.sock").exists, slurm, "munged has opened its socket")
    _daemon(slurm, stack, "slurmctld", slurm.on("hostS", ["slurmctld", "-c", "-i", "-D"]))
    for host in HOSTS:
        _daemon(slurm, stack, f"slurmd.{host}", slurm.on(host, ["slurmd", "-N", host, "-D"]))
    _until(lambda: _idle_nodes(slurm) == len(HOSTS), slurm, "both nodes are idle")


def _daemon(slurm: Cluster, stack: ExitStack, name: str, command: Sequence[str]) -> None:
    """Start a daemon in the foreground of a process of ours, and end it with the stack."""
    with (slurm.folder / f"{name}.out").open("w") as out:
        process = subprocess.Popen(
            command, env=os.environ | slurm.environment, stdin=subprocess.DEVNULL, stdout=out, stderr=out
        )

    def end() -> None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    stack.callback(end)


def _idle_nodes(slurm: Cluster) -> int:
    command = slurm.on("hostS", ["sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D"])
    found = subprocess.run(
        command, env=os.environ | slurm.environment, capture_output=True, text=True, timeout=60, check=False
    )
    return int(found.stdout or 0) if found.returncode == 0 else 0


def _until(reached: Callable[[], bool], slurm: Cluster, what: str) -> None:
    deadline = time.monotonic() + START_S
    while not reached():
        logs = "\n".join(f"== {path.name}\n{path.read_text()[-1000:]}" for path in slurm.folder.glob("*.out"))
        assert time.monotonic() < deadline, f"not so after {START_S:.0f} s: {what}\n{logs}"
        time.sleep(0.1)


def _end_jobs(slurm: Cluster) -> None:
    """Cancel what is left, so that no process of a job outlives the cluster."""
    slurm.run("scancel", "--user=root")
    _until(lambda: not slurm.run("squeue", "--noheader").strip(), slurm, "no job is left")
