#!/usr/bin/env bash
#SBATCH --job-name=genac-smoke
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --gpus-per-node=8
#SBATCH --time=00:10:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.out
# Does this cluster work? Preflight and a tiny run of every stage on one node, in ten minutes.
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

: "${RECIPE:=$GENAC_HOME/recipes/cluster/smoke.yaml}"
export RECIPE
GENAC_LAST_WORDS="your cluster works"
ranks=${SLURM_NTASKS:-8}
genac_job name="smoke-${SLURM_JOB_ID:-0}" world.ranks="$ranks" cluster.ranks_per_node="$ranks" "$@"
