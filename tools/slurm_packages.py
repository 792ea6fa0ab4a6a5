"""Have a Slurm to test on: Debian's slurm-wlm and munge, installed in CI, asked for elsewhere.

    python tools/slurm_packages.py      before `make test-slurm`

Installs where CI is set, we are root and there is apt-get; anywhere else says that these tests will be
skipped and what to install. Exit code 2: they could not be installed where CI wants them. Standard
library only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "sinfo")
PATH = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # daemons may lie there
APT = ("apt-get", "-y", "-q", "-o", "DPkg::Lock::Timeout=300")
ATTEMPTS, PAUSE_S = 3, 10.0
LIMIT_S = 600


def missing() -> list[str]:
    """Programs that this machine lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=PATH) is None]


def install() -> str:
    """Install the packages; returns the end of what apt-get said where it failed each time, else ''."""
    environ = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    steps = ((*APT, "update"), (*APT, "install", "--no-install-recommends", *PACKAGES))
    said = ""
    for attempt in range(ATTEMPTS):
        time.sleep(PAUSE_S * attempt)
        for step in steps:
            try:
                done = subprocess.run(step, env=environ, capture_output=True, text=True, timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                said = f"{' '.join(step)} took more than {LIMIT_S} s"
                break
            said = (done.stdout + done.stderr)[-1000:]
            if done.returncode:
                break
        else:
            return ""
    return said


def main() -> int:
    absent = missing()
    if not absent:
        return 0
    by_hand = f"apt-get install {' '.join(PACKAGES)}"
    if not os.environ.get("CI") or os.geteuid() != 0 or not shutil.which("apt-get"):
        print(f"no Slurm here ({', '.join(absent)} missing): its tests will be skipped", file=sys.stderr)
        print(f"  to run them: {by_hand}", file=sys.stderr)
        return 0
    print(f"installing {' and '.join(PACKAGES)}", file=sys.stderr, flush=True)
    if (said := install()) or missing():
        print(f"{', '.join(PACKAGES)} could not be installed: {said}", file=sys.stderr)
        print(f"  way out: {by_hand}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
