#!/usr/bin/env bash
# End this user's processes on this node whose GENAC_RANK_OF is $1, an attempt's mark; says how many.
set -euo pipefail

attempt=${1:?the attempt}
ended=0
for folder in /proc/[0-9]*; do
  [ -O "$folder" ] || continue
  grep -qzxF "GENAC_RANK_OF=$attempt" "$folder/environ" 2>/dev/null || continue
  if kill -KILL "${folder#/proc/}" 2>/dev/null; then ended=$((ended + 1)); fi
done
[ "$ended" = 0 ] || echo "$(hostname): ended $ended leftover process(es) of attempt $attempt"
