#!/usr/bin/env bash
#SBATCH --job-name=genac-ppo
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Joint PPO of actor and critic, resumed where its run folder holds a checkpoint. From any folder:
#   RECIPE=recipe.yaml sbatch --nodes=2 /path/to/slurm/genac_ppo.sh -- key.path=value
# `genac slurm RECIPE` works out nodes, tasks and GPUs and submits this script.
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

genac_job "$@"
