#!/usr/bin/env bash
#SBATCH --job-name=genac-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --cpus-per-task=32
#SBATCH --gpus-per-node=8
#SBATCH --time=04:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# genac evaluate on one node, which starts the recipe's ranks there; its arguments are the command's:
#   sbatch slurm/evaluate.sh task math500 RECIPE --out=scores     sbatch slurm/evaluate.sh bank build RECIPE --out=bank
# A recipe of more ranks than the node has GPUs needs a smaller layout: world.ranks=8 roles.actor.layout.tp=8
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

genac_alone evaluate "$@"
