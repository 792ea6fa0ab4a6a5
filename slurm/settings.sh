# shellcheck shell=bash
# Settings of your cluster: edit once. Every one may also be set in the environment of sbatch.
# Partition, account and quality of service are sbatch's own: export SBATCH_PARTITION=..., SBATCH_ACCOUNT=...,
# SBATCH_QOS=... in your shell, or give `genac slurm` --partition, --account, --qos.

# How Python is found: venv (a folder that all nodes see), apptainer, or pyxis (srun --container-image).
: "${GENAC_RUNTIME:=venv}"
: "${GENAC_PYTHON:=python3}"     # venv: its interpreter; in a container: the interpreter there
: "${GENAC_SERVE_PYTHON:=}"      # SGLang's environment, in a container: there; empty: engine.python of recipes
: "${GENAC_IMAGE:=}"             # apptainer: a .sif file; pyxis: a .sqsh file or an image's address
: "${GENAC_MOUNTS:=}"            # containers: further folders, as /host/path:/path,/host/other:/other

# Interfaces of the fabric, best first, such as ib0 (empty: InfiniBand, RoCE, or the kernel's way to the peer).
: "${GENAC_FABRIC:=}"

: "${GENAC_PREFLIGHT:=on}"       # on: check every node before the run; off
: "${GENAC_PREFLIGHT_S:=115}"    # seconds that it may take
: "${GENAC_MIN_BUSBW:=0}"        # GB/s that its all-reduce must reach; 0: report only
: "${GENAC_MIN_FREE_GIB:=50}"    # free space that the run folder must have

: "${GENAC_REQUEUE:=on}"         # on: a stopped job goes back into the queue; off: the next of a chain goes on
: "${GENAC_MAX_REQUEUES:=50}"
: "${GENAC_GRACE_S:=240}"        # after USR1: seconds for a checkpoint (--signal gives 300)
: "${GENAC_LEAVE_S:=45}"         # and more, before what still runs is killed; above Slurm's KillWait
: "${GENAC_STALL_S:=600}"        # seconds without any progress after which every rank dumps its stack

# NCCL and offline use: what every rank gets.
: "${HF_HUB_OFFLINE:=1}"
: "${TORCH_NCCL_ASYNC_ERROR_HANDLING:=1}"
