# Shared by the batch scripts of this folder, which source it. See docs/cluster.md.
# shellcheck shell=bash

set -euo pipefail

# Where the clone is: two folders above this file.
GENAC_HOME=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=slurm/settings.sh
. "$GENAC_HOME/slurm/settings.sh"
export GENAC_HOME GENAC_FABRIC GENAC_MIN_BUSBW GENAC_MIN_FREE_GIB GENAC_STALL_S
export GENAC_SERVE_PYTHON HF_HUB_OFFLINE TORCH_NCCL_ASYNC_ERROR_HANDLING
export PYTHONPATH="$GENAC_HOME${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

say() { printf '%s genac: %s\n' "$(date +%H:%M:%S)" "$*"; }
die() { local code=$1; shift; say "error: $*" >&2; exit "$code"; }

# What runs genac: `command` inside a task, `step_options` for srun around it; `alone` once, on this node.
command=() step_options=() alone=()
set_runtime() {
  local mounts="$GENAC_HOME,$PWD${GENAC_MOUNTS:+,$GENAC_MOUNTS}"
  case $GENAC_RUNTIME:$GENAC_HOME$PWD in
    apptainer:*[,:]* | pyxis:*[,:]*)
      die 2 "a container mounts no folder with a comma or a colon in its path: $GENAC_HOME, $PWD" ;;
  esac
  case $GENAC_RUNTIME in
    venv) command=("$GENAC_PYTHON") ;;
    apptainer)
      [ -n "$GENAC_IMAGE" ] || die 2 "GENAC_RUNTIME=apptainer needs GENAC_IMAGE (slurm/settings.sh)"
      command=(apptainer exec --nv --pwd "$PWD" --bind "$mounts" "$GENAC_IMAGE" "$GENAC_PYTHON") ;;
    pyxis)
      [ -n "$GENAC_IMAGE" ] || die 2 "GENAC_RUNTIME=pyxis needs GENAC_IMAGE (slurm/settings.sh)"
      step_options=(--container-image="$GENAC_IMAGE" --container-workdir="$PWD" --no-container-mount-home
        --container-mounts="$(with_targets "$mounts")")
      command=("$GENAC_PYTHON") ;;
    *) die 2 "GENAC_RUNTIME is '$GENAC_RUNTIME': venv, apptainer or pyxis" ;;
  esac
  command+=(-m genac_megatron)
  alone=("${command[@]}")
  [ "$GENAC_RUNTIME" != pyxis ] || alone=(srun --overlap --nodes=1 --ntasks=1 --ntasks-per-node=1
    --nodelist="${SLURMD_NODENAME:-}" "${step_options[@]}" "${command[@]}")
}

# /a,/b:/c -> /a:/a,/b:/c, as pyxis wants it.
with_targets() {
  local item all=
  local IFS=,
  for item in $1; do
    case $item in *:*) ;; *) item=$item:$item ;; esac
    all=${all:+$all,}$item
  done
  printf '%s' "$all"
}

# An address of another node of the job, as Slurm knows it; nothing for a job of one node.
peer_address() {
  local other
  other=$(scontrol show hostnames "${SLURM_JOB_NODELIST:?}" | sed -n 2p)
  [ -z "$other" ] || scontrol show node "$other" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p'
}

# The job's end in seconds since the epoch; 0 where it has none.
job_end() {
  local text
  text=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e 2>/dev/null || true)
  date -d "$text" +%s 2>/dev/null || echo 0
}

find_recipe() {
  [ -n "${RECIPE:-}" ] || die 2 "name a recipe: RECIPE=path/to/recipe.yaml sbatch $0"
  if [ ! -f "$RECIPE" ] && [ -f "$GENAC_HOME/$RECIPE" ]; then RECIPE=$GENAC_HOME/$RECIPE; fi
  [ -f "$RECIPE" ] || die 2 "there is no recipe $RECIPE, neither from $PWD nor from $GENAC_HOME"
}

# The step that runs, and who prints the summary: neither outlives this script.
step='' follower=''
finish() {
  trap - EXIT
  if [ -n "$follower" ]; then kill "$follower" 2>/dev/null || true; fi
  end_step
}

# srun ends its tasks on SIGTERM: SIGTERM to them, SIGKILL after Slurm's KillWait.
end_step() {
  if [ -n "$step" ] && kill -TERM "$step" 2>/dev/null; then
    wait "$step" 2>/dev/null || true
  fi
  step=''
}

# Ranks look for this file once a second: a signal sent through Slurm would hit their helpers too.
stop_asked='' too_late='' cancelled=''
ask_to_stop() {
  [ -z "$stop_asked" ] || return 0
  stop_asked=$SECONDS
  if [ -n "${GENAC_LOGS:-}" ]; then : >"$GENAC_LOGS/stop"; fi
  say "asked to stop: saving at the next safe point (for $GENAC_GRACE_S s)"
}

# SIGTERM is scancel or a preemption: what comes after is Slurm's affair, never a requeue of ours.
on_term() {
  cancelled=1
  ask_to_stop
}

# Wait for the step so that traps run at once; give up GENAC_GRACE_S after a request to stop: SIGTERM, then SIGKILL.
wait_for_step() {
  local tick
  while kill -0 "$step" 2>/dev/null; do
    sleep 1 & tick=$!
    wait "$tick" || true
    if [ -n "$stop_asked" ] && [ $((SECONDS - stop_asked)) -gt "$GENAC_GRACE_S" ] && [ -z "$too_late" ]; then
      too_late=$SECONDS
      say "no safe point within $GENAC_GRACE_S s: ending it; what was saved before stands"
      kill -TERM "$step" 2>/dev/null || true
    fi
    if [ -n "$too_late" ] && [ $((SECONDS - too_late)) -gt "$GENAC_LEAVE_S" ]; then
      kill -KILL "$step" 2>/dev/null || true
    fi
  done
  code=0
  wait "$step" || code=$?
  step=''
}

# What its processes carry in GENAC_RANK_OF. A job's number alone may be another cluster's too, on one machine.
mark() { printf '%s:%s' "$GENAC_ATTEMPT" "${SLURM_SUBMIT_DIR:-$PWD}"; }

# srun with the recipe's geometry, in the background; the first argument names the log.
start_step() {
  local log=$1; shift
  GENAC_RANK_OF=$(mark) srun --nodes="$GENAC_NODES" --ntasks="$GENAC_RANKS" \
    --ntasks-per-node="$GENAC_RANKS_PER_NODE" --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    --distribution=block:block --kill-on-bad-exit=1 --wait=0 --export=ALL --label \
    --output="${GENAC_LOGS//%/%%}/$log-node%n-%N.log" "${step_options[@]}" "${command[@]}" "$@" &
  step=$!
}

# Every node looked at before the run: exits 2 with the bad ones named.
preflight() {
  local began=$SECONDS
  [ "$GENAC_PREFLIGHT" = on ] || return 0
  MASTER_PORT=$GENAC_PREFLIGHT_PORT start_step preflight preflight "$RECIPE" \
    --folder="$GENAC_LOGS/preflight" "$@"
  while kill -0 "$step" 2>/dev/null && [ $((SECONDS - began)) -lt "$GENAC_PREFLIGHT_S" ]; do
    sleep 1 & wait $! || true
  done
  if kill -0 "$step" 2>/dev/null; then
    say "preflight: not done after $GENAC_PREFLIGHT_S s"
    end_step
  else
    wait "$step" 2>/dev/null || true
    step=''
  fi
  "${alone[@]}" preflight "$RECIPE" --folder="$GENAC_LOGS/preflight" --verdict "$@" || { last_words 2; exit 2; }
}

# End processes of this attempt that outlive the step (where Slurm tracks processes by cgroup there are none).
reap() {
  [ -n "${GENAC_LOGS:-}" ] || return 0
  timeout 60 srun --overlap --nodes="$GENAC_NODES" --ntasks="$GENAC_NODES" --ntasks-per-node=1 \
    bash "$GENAC_HOME/slurm/reap.sh" "$(mark)" || say "warning: could not look for leftover processes"
}

# The job's last words of its run: what happened, the run folder, the command to type. Arguments: the exit code,
# and --requeued where Slurm starts the job again.
last_words() {
  [ -n "${GENAC_RUN:-}" ] || return 0
  "${alone[@]}" status "$GENAC_RUN" --again="${GENAC_AGAIN:-}" --ended="$@" || true
}

# Back into the queue; the next attempt resumes.
requeue() {
  trap '' USR1 TERM
  local count=${SLURM_RESTART_COUNT:-0}
  if [ -n "$cancelled" ]; then
    say "cancelled or preempted, with a checkpoint: sbatch the same again, it resumes"
    last_words 75
    exit 75
  fi
  if [ "$GENAC_REQUEUE" != on ]; then
    say "stopped with a checkpoint; GENAC_REQUEUE is off: the next job of the chain goes on"
    last_words 75
    exit 75
  fi
  if [ "$count" -ge "$GENAC_MAX_REQUEUES" ]; then
    last_words 75
    die 75 "requeued $count times already (GENAC_MAX_REQUEUES)"
  fi
  say "requeue (restart $((count + 1)))"
  last_words 75 --requeued
  scontrol requeue "$SLURM_JOB_ID" || die 75 "Slurm refused to requeue; sbatch the same again, it resumes"
  exit 75
}

explain() {
  case $1 in
    0) say "done: $GENAC_RUN/report/index.html${GENAC_LAST_WORDS:+; $GENAC_LAST_WORDS}" ;;
    2) say "the recipe or an input is wrong: see the message above or $GENAC_LOGS" ;;
    3) say "a gate failed: the stage ended below what its recipe asks for; see $GENAC_LOGS" ;;
    4) say "a rank or an engine was lost; sbatch the same again, it resumes; see $GENAC_LOGS" ;;
    *) say "ended with code $1: see $GENAC_LOGS" ;;
  esac
  last_words "$1"
}

# The exit code that a rank meant, one that says why first, a lost peer last: it mostly follows from another
# rank's end. srun also reports ranks that it ended itself.
said_code() {
  local code
  for code in 2 3 75 1 4; do
    if grep -qs "\"code\": $code," "$GENAC_LOGS"/heartbeats/*.json; then echo "$code"; return; fi
  done
  echo "$1"
}

# Lines of the ranks' logs that say what happened.
show_errors() {
  { grep -hE 'genac: (error|stopped|unexpected error)' -A4 "$GENAC_LOGS"/trainer-*.log || true; } | head -n 40
}

# A training job: plan, preflight, ranks, and what comes after. Arguments: overrides, after an optional --.
genac_job() {
  local given=() word code=0
  for word in "$@"; do [ "$word" = -- ] || given+=("$word"); done
  set_runtime
  find_recipe
  [ -n "${SLURM_JOB_ID:-}" ] || exec "${command[@]}" slurm "$RECIPE" "${given[@]}"  # on a login node
  GENAC_ATTEMPT="$SLURM_JOB_ID-r${SLURM_RESTART_COUNT:-0}"
  trap ask_to_stop USR1
  trap on_term TERM
  trap finish EXIT
  GENAC_PEER=$(peer_address)
  GENAC_NODE_NAMES=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | tr '\n' ' ')
  export GENAC_PEER GENAC_NODE_NAMES
  local variables
  [ -n "${GENAC_AGAIN:-}" ] || GENAC_AGAIN="genac slurm$(printf ' %q' "$RECIPE" "${given[@]}")"
  variables=$("${alone[@]}" slurm "$RECIPE" --job "${given[@]}") || exit $?
  eval "$variables"
  say "job $GENAC_ATTEMPT: $RECIPE on $SLURM_JOB_NODELIST, meeting at $GENAC_MEETS_AT"
  say "run folder $GENAC_RUN, logs $GENAC_LOGS"
  local added=()
  read -r -a added <<<"$GENAC_ADDED"
  given+=("${added[@]}")
  [ -z "$GENAC_FINISHED" ] || { say "this run is finished: nothing to do"; last_words 0; exit 0; }
  [ -z "$GENAC_POSITION" ] || say "resuming after $GENAC_POSITION"
  preflight "${given[@]}"
  [ -z "$stop_asked" ] || requeue
  start_step trainer run "$RECIPE" ${GENAC_RESUME:+"$GENAC_RESUME"} "${given[@]}"
  "${alone[@]}" status "$GENAC_RUN" --follow --until="$(job_end)" & follower=$!
  wait_for_step
  kill "$follower" 2>/dev/null || true
  follower=''
  if [ "$code" != 0 ]; then
    code=$(said_code "$code")
    show_errors
  fi
  reap
  case $code in
    75) requeue ;;
    0 | 2 | 3) ;;
    *) if [ -n "$stop_asked" ]; then requeue; fi ;;  # ended before all had left: the newest checkpoint stands
  esac
  if [ "$code" -gt 128 ]; then
    say "a rank was ended by signal $((code - 128))"
    code=4
  fi
  explain "$code"
  exit "$code"
}

# A signal for the batch script is one for the command that it waits for.
pass_on() {
  [ -n "$stop_asked" ] || say "asked to stop ($1): leaving at the next safe point (within $GENAC_GRACE_S s)"
  [ -n "$stop_asked" ] || stop_asked=$SECONDS
  [ "$1" != TERM ] || cancelled=1
  if [ -n "$step" ]; then kill -s "$1" "$step" 2>/dev/null || true; fi
}

# One genac command on the job's first node, which starts its own ranks. Arguments: the command's.
# Asked to stop it leaves at its next safe point, what is done kept: then the job is requeued, and the same
# command goes on. Not where it came to none in GENAC_GRACE_S, as the next attempt might not either.
genac_alone() {
  set_runtime
  local code=0
  GENAC_ATTEMPT="${SLURM_JOB_ID:-local-$$}-r${SLURM_RESTART_COUNT:-0}"
  trap 'pass_on USR1' USR1
  trap 'pass_on TERM' TERM
  trap finish EXIT
  [ -z "$stop_asked" ] || requeue
  GENAC_RANK_OF=$(mark) "${alone[@]}" "$@" & step=$!
  wait_for_step
  bash "$GENAC_HOME/slurm/reap.sh" "$(mark)" || say "warning: could not look for leftover processes"
  say "genac $1 ended with code $code"
  case $code in
    0 | 2 | 3) ;;
    *) if [ -n "$stop_asked" ] && [ -z "$too_late$cancelled" ] || [ "$code" = 75 ]; then requeue; fi ;;
  esac
  exit "$code"
}
