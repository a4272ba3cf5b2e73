"""A real Slurm of one node on this machine, which is lost while an array of noisytune runs: in a namespace.

    python slurm_cluster.py FOLDER SOURCE OUT

FOLDER takes what its daemons write. Writes JSON: exit codes, what `finish` said first, how often each task of
the array began, the seconds from the first `sbatch` to the output.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

_ADDRESS = "10.99.0.1"

#: Seconds that anything may take.
_PATIENCE = 60.0

_CONF = """
ClusterName=test
SlurmctldHost={host}({address})
MailProg=/bin/true
SlurmUser=root
AuthInfo=socket={folder}/munge.socket
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
MpiDefault=none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SchedulerParameters=sched_interval=1,batch_sched_delay=0
NodeName=node NodeAddr={address} CPUs=2 State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def main(folder: Path, source: str, out: str) -> None:
    # Without a second interface its look-up of names hangs.
    for command in ("link add v0 type veth peer name v1", f"addr add {_ADDRESS}/24 dev v0", "link set v0 up"):
        subprocess.run(["ip", *command.split()], check=True)
    subprocess.run(["ip", "link", "set", "v1", "up"], check=True)
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(64))
    (folder / "munge.key").chmod(0o400)
    (folder / "slurm.conf").write_text(
        _CONF.format(folder=folder, address=_ADDRESS, host=socket.gethostname().partition(".")[0])
    )
    os.environ["SLURM_CONF"] = str(folder / "slurm.conf")
    paths = [f"--{what}={folder}/munge.{what.split('-')[0]}" for what in _MUNGE]
    daemons = [
        ["munged", "--foreground", "--force", *paths],
        ["slurmctld", "-D"],
        ["slurmd", "-D", "-N", "node"],
    ]
    for daemon in daemons:
        log = (folder / f"{daemon[0]}.out").open("wb")
        subprocess.Popen([f"/usr/sbin/{daemon[0]}", *daemon[1:]], stdout=log, stderr=log)
        if daemon[0] == "munged":
            wait_for((folder / "munge.socket").exists)
    wait_for(is_listening)
    wait_for(lambda: "idle" in told("sinfo", "-h", "-o", "%T"))
    print(json.dumps(run(folder, source, out)))


#: What munged is told the place of: its socket, its key and so on.
_MUNGE = ("socket", "key-file", "pid-file", "log-file", "seed-file")


def run(folder: Path, source: str, out: str) -> dict[str, object]:
    """Plan, submit, lose a task for good and the node once, and finish."""
    noisytune = [sys.executable, "-P", "-m", "noisytune_cli"]
    shares = told(*noisytune, "plan", source, "-o", out, "--share-bytes", "1", "-q").strip()
    started = time.monotonic()
    # A task begins with a mark of its own, then gives the node time to be lost.
    mark = f'mktemp {folder}/began-"$SLURM_ARRAY_TASK_ID"-XXXX; sleep 1.5; '
    command = mark + shlex.join([*noisytune, "work", out, "--share", "env"])
    batch = ("sbatch", "--parsable", f"--output={folder}/task-%a.out", "--requeue")
    array = told(*batch, f"--array=1-{shares}", "--wrap", command).strip()
    told("scancel", f"{array}_{shares}")
    wait_for(lambda: list(folder.glob("began-*")))
    told("scontrol", "update", "nodename=node", "state=down", "reason=lost")
    wait_for(
        lambda: "lost" not in told("sinfo", "-h", "-o", "%E %T") and not told("squeue", "-h", "-t", "R,CG")
    )
    for task in told("squeue", "-h", "-o", "%i", "-t", "PD").split():
        told("scontrol", "update", f"jobid={task}", "starttime=now")  # it would let them wait for two minutes
    wait_for(lambda: not told("squeue", "-h"))
    first = subprocess.run([*noisytune, "finish", out], capture_output=True, text=True, check=False)
    rest = told(*batch, "--wrap", shlex.join([*noisytune, "work", out])).strip()
    told(*batch, f"--dependency=afterok:{rest}", "--wrap", shlex.join([*noisytune, "finish", out]))
    wait_for(lambda: not told("squeue", "-h"))
    return {
        "seconds": time.monotonic() - started,
        "first": [first.returncode, first.stderr],
        "began": sorted(int(path.name.split("-")[1]) for path in folder.glob("began-*")),
        "published": Path(out).is_dir(),
    }


def is_listening() -> bool:
    """Tell whether the controller takes connections."""
    with socket.socket() as one:
        return one.connect_ex((_ADDRESS, 6817)) == 0


def told(*command: str) -> str:
    """Return what a command writes to stdout."""
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_PATIENCE).stdout


def wait_for(condition: Callable[[], object]) -> None:
    """Wait until something holds."""
    until = time.monotonic() + _PATIENCE
    while not condition():
        if time.monotonic() > until:
            raise TimeoutError
        time.sleep(0.1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
