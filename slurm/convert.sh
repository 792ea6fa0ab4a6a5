#!/usr/bin/env bash
#SBATCH --job-name=genac-convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# genac convert on one node; its arguments are the command's:  sbatch slurm/convert.sh to-hf SRC DST
# At its time limit it is requeued and goes on where it stopped, and so where the same is submitted again. It
# wants memory and no GPU.
set -euo pipefail

# Slurm runs a copy of this file: the job knows where the original is, a path (with spaces or not) and arguments.
here=${GENAC_HOME:+$GENAC_HOME/slurm}
told=$(scontrol show job "${SLURM_JOB_ID:-0}" 2>/dev/null | sed -n 's|^ *Command=||p' || true)
while [ -z "$here" ] && [ -n "$told" ]; do
  [ ! -f "${told%/*}/common.sh" ] || here=${told%/*}
  case $told in *' '*) told=${told% *} ;; *) told= ;; esac
done
# shellcheck source=slurm/common.sh
. "${here:-$(dirname "$0")}/common.sh"

genac_alone convert "$@"
