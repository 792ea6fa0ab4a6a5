#!/usr/bin/env bash
# Where a cluster does not requeue: N jobs one after another, each going on from the last one's checkpoint.
#   RECIPE=recipe.yaml slurm/chain.sh 5 --job-name=my-run slurm/genac_ppo.sh -- key.path=value
# Jobs of one name and user wait for each other; those after the run's end see that it is finished.
set -euo pipefail

count=${1:?how many jobs}
shift
for ((number = 0; number < count; number++)); do
  GENAC_REQUEUE=off sbatch --no-requeue --dependency=singleton "$@"
done
