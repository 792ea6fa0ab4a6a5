#!/usr/bin/env bash
# What one GPU tells in some fifteen minutes, most telling first, each step in a time box.
#
#   tools/gpu_minutes.sh 1                    facts parity fp8 tests | ipc server serverfp8   (two lanes at once)
#   tools/gpu_minutes.sh 2                    train logprobs publish joint accuracy memory    (one after the other)
#   tools/gpu_minutes.sh facts server ...     steps by name, one after the other (serverlora by name alone: adapters)
#   tools/gpu_minutes.sh --tiny ...           the same on a CPU: it tries the plumbing, figures say nothing
#
#   --bundles FOLDER   te.tar.xz and sgl.tar.xz there, site-packages for a base Python (GENAC_MINUTES_PYTHON, default
#                      python3) that has torch with CUDA: unpacked once into a temporary folder, nothing is installed.
#                      Without it GENAC_GPU_PYTHON and GENAC_SERVE_PYTHON, as tools/gpu_setup.sh prints them.
#   --out FOLDER       default runs/gpu-minutes/DATE-STEPS; results that lie there are kept as NAME.before
#   --limit SECONDS    of the whole call (default 350); no step begins that has no 8 s left
#   --scale FACTOR     multiplies every box
#
# FOLDER/results.jsonl has a line of JSON per figure and per test, written as soon as it is known, so what ran before a
# stop counts; summary.txt the steps' ends, log.txt what they said, extra.tar.gz their logs. Nothing is set on the card.
# Exit code: 0 where every step that began went well, 1 where one failed or ran out of its box, 2 for wrong arguments,
# 130 where it was stopped.
# NOT run on a GPU yet.
set -u
began=$SECONDS
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
bundles= out= limit=350 scale=1 tiny= names=()
fail() { echo "gpu_minutes: $1" >&2; echo "gpu_minutes:   way out: $2" >&2; exit 2; }
while [ $# -gt 0 ]; do
    case $1 in
        --tiny) tiny=--tiny; shift ;;
        --bundles|--out|--limit|--scale)
            [ $# -ge 2 ] || fail "$1 needs a value" "see the head of tools/gpu_minutes.sh"
            declare "${1#--}=$2"; shift 2 ;;
        -*) fail "unknown option $1" "see the head of tools/gpu_minutes.sh" ;;
        *) names+=("$1"); shift ;;
    esac
done
known="facts parity fp8 tests ipc server serverfp8 serverlora train train8b train1b train0b logprobs publish joint accuracy memory"
[ ${#names[@]} -gt 0 ] || fail "no step named" "tools/gpu_minutes.sh 1, or some of: $known"
for name in "${names[@]}"; do
    case " 1 2 $known " in *" $name "*) ;; *) fail "there is no step $name" "1, 2 or some of: $known" ;; esac
done
for number in "$limit" "$scale"; do
    [[ $number =~ ^[0-9]+(\.[0-9]+)?$ ]] ||
        fail "--limit and --scale are numbers, not $limit and $scale" "--limit 350 --scale 1"
done
[ -z "$bundles" ] || [ -r "$bundles/te.tar.xz" -a -r "$bundles/sgl.tar.xz" ] ||
    fail "no te.tar.xz and sgl.tar.xz in $bundles" "name their folder, or leave --bundles out"
out=${out:-$root/runs/gpu-minutes/$(date -u +%Y%m%dT%H%M%S)-$(IFS=-; echo "${names[*]}")}
mkdir -p "$out" || fail "$out cannot be made" "--out FOLDER"
out=$(cd -- "$out" && pwd) logs=$(mktemp -d "${TMPDIR:-/tmp}/genac-minutes.XXXXXX")
cd "$root"

# Two lists of folders before the base's own packages; no venv, which would not see its parent's.
unpack_bundles() {
    base=$(command -v "${GENAC_MINUTES_PYTHON:-python3}") || fail "no ${GENAC_MINUTES_PYTHON:-python3} here" "GENAC_MINUTES_PYTHON=/path/to/python"
    home=${TMPDIR:-/tmp}/genac-minutes-bundles$tiny
    mkdir -p "$home"
    if [ ! -e "$home/ready" ]; then
        "$base" - "$bundles" "$home" <<'PY' || return 1
import sys, tarfile
from multiprocessing import Process
from pathlib import Path

bundles, home = map(Path, sys.argv[1:])


def unpack(name):
    with tarfile.open(bundles / f"{name}.tar.xz", "r:xz") as packed:  # not tar: a machine may lack xz
        packed.extractall(home, filter="fully_trusted")


if __name__ == "__main__":
    jobs = [Process(target=unpack, args=(name,)) for name in ("te", "sgl")]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    if any(job.exitcode for job in jobs):
        raise SystemExit("a bundle could not be unpacked")
    share = home / "share"  # what the trainer takes of the servers' bundle
    share.mkdir(exist_ok=True)
    for path in (home / "sgl").iterdir():
        if path.name.split("-")[0] in ("transformers", "tokenizers") and not (share / path.name).exists():
            (share / path.name).symlink_to(path)
PY
        # Neither loads without a driver.
        [ -z "$tiny" ] || rm -rf "$home"/te/transformer_engine* "$home"/te/nvdlfw* "$home"/sgl/sgl_kernel*
        printf '#!/bin/sh\nPYTHONPATH=%s exec %s "$@"\n' "$home/sgl" "$base" > "$home/serve-python"
        chmod +x "$home/serve-python"
        touch "$home/ready"
    fi
    export GENAC_SERVE_PYTHON=$home/serve-python PYTHONPATH=$root:$home/te:$home/share
    export TRITON_CACHE_DIR=$home/triton TORCHINDUCTOR_CACHE_DIR=$home/inductor TVM_FFI_CACHE_DIR=$home/sgl/_jit
    local folder libraries
    for folder in ${CUDA_HOME:-} /usr/local/cuda /usr/local/cuda-13* /opt/cuda; do
        [ -x "$folder/bin/nvcc" ] && { export CUDA_HOME=$folder PATH=$folder/bin:$PATH; break; }
    done
    libraries=$("$base" -c 'import nvidia; print(list(nvidia.__path__)[0])' 2>/dev/null || true)
    for folder in "${CUDA_HOME:-/none}/include" "$libraries/cu13/include"; do
        [ -e "$folder/cuda_runtime.h" ] && { export NVTE_CUDA_INCLUDE_DIR=$folder; break; }
    done
    [ -z "$libraries" ] ||
        export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$libraries/cu13/lib:$libraries/cudnn/lib:$libraries/nccl/lib
}

environment() {
    export PYTHONNOUSERSITE=1 PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} GLOO_SOCKET_IFNAME=lo NCCL_SOCKET_IFNAME=lo NCCL_IB_DISABLE=1
    if [ -n "$bundles" ]; then unpack_bundles; return; fi
    base=${GENAC_GPU_PYTHON:-}
    [ -n "$base" ] || fail "GENAC_GPU_PYTHON is not set" "tools/gpu_setup.sh prints it, or --bundles FOLDER"
    export PYTHONPATH=$root
}

note() { printf '%s\n' "$1" | tee -a "$out/summary.txt"; }

# step NAME BOX COMMAND...: at most BOX seconds, and never beyond the call's limit; what it says goes to log.NAME
step() {
    local name=$1 box left t rc=0
    box=$(($2 * thousandths / 1000)); shift 2
    left=$((${limit%.*} - (SECONDS - began) - 6)); [ "$left" -lt "$box" ] && box=$left
    if [ "$box" -lt 8 ]; then note "$(printf '%-10s not begun: %s s left' "$name" "$left")"; return 1; fi
    t=$SECONDS
    timeout -k 5 "$box" "$@" > "$logs/log.$name" 2>&1 < /dev/null & child=$!
    wait $child || rc=$?
    child=
    [ $rc -eq 0 ] || touch "$logs/failed"
    note "$(printf '%-10s rc %-3s %4s s of %s, from second %s' "$name" $rc $((SECONDS - t)) "$box" $((t - began)))"
    printf '{"what": "step", "step": "%s", "rc": %s, "seconds": %s, "box": %s}\n' "$name" $rc $((SECONDS - t)) "$box" >> "$out/results.jsonl"
    return $rc
}
minutes() { step "$1" "$2" "$base" -W ignore -m benchmarks.gpu.minutes "$1" --results "$out/results.jsonl" --logs "$logs" $tiny; }
# In several processes where pytest-xdist is, so that a lost CUDA context is one worker's; failures once more, alone.
pytests() {
    local name=$1 box=$2 workers; shift 2
    workers=$("$base" -c 'import importlib.util as u; print("-n 4 --dist load" if u.find_spec("xdist") else "")')
    local options="-p benchmarks.gpu.minutes.each_test --results $out/results.jsonl $tiny"
    options+=" -o minversion=0 -o addopts= -o cache_dir=$logs/pytest -q -rA --tb=short"
    [ -z "$tiny" ] || workers=
    step "$name" "$box" "$base" -W ignore -m pytest --step "$name" $options $workers "$@" && return
    step "$name-again" 60 "$base" -W ignore -m pytest --step "$name-again" $options --lf --lfnf=none --maxfail=6 --tb=long "$@"
}

run_step() {
    case $1 in
        facts) minutes facts 75 ;;
        parity) minutes parity 90 ;;
        fp8) minutes fp8 100 ;;
        tests) pytests tests 170 tests/gpu/test_precision.py tests/gpu/test_gpu_logprobs.py \
            tests/gpu/test_gpu_rest.py tests/gpu/test_gpu_trees.py tests/gpu/test_world.py ;;
        ipc) pytests ipc 60 tests/gpu/test_gpu_publication.py::test_another_process_reads_what_a_device_bucket_holds ;;
        server) minutes server 190 ;;
        serverfp8) minutes serverfp8 140 ;;
        serverlora) minutes serverlora 170 ;;
        train) minutes train8b 95; minutes train1b 60; minutes train0b 45 ;;
        train8b|train1b|train0b) minutes "$1" 110 ;;
        joint) minutes joint 170 ;;
        logprobs|memory) minutes "$1" 60 ;;
        publish) minutes publish 50 ;;
        accuracy) minutes accuracy 80 ;;
    esac
}

# timeout has a process group of its own, so what is sent to this one's has to be passed on.
child= lane=
stopped() {
    trap '' INT TERM HUP
    for pid in $child $lane; do kill -TERM "$pid" 2> /dev/null; done
    wait
    exit 130
}

finish() {
    local rc=$?
    cat "$logs"/log.* 2>/dev/null | tail -c 12000000 > "$out/log.txt"
    tar czf "$out/extra.tar.gz" -C "$logs" . 2>/dev/null
    echo; echo "== $((SECONDS - began)) s of $limit"; cat "$out/summary.txt"; echo
    [ ! -e "$out/results.jsonl" ] || "$base" - "$out/results.jsonl" <<'PY'
import json, sys

for row in map(json.loads, open(sys.argv[1])):
    if row["step"] and row["what"] != "step":
        rest = {key: value for key, value in row.items() if key not in ("ok", "step", "what", "at_s")}
        print("ok  " if row.get("ok", True) else "FAIL", f"{row['step']}: {row['what']}", json.dumps(rest)[:420])
PY
    for log in "$logs"/log.tests* "$logs"/log.ipc*; do
        [ -e "$log" ] && { echo "-- ${log##*/}"; grep -E "^(FAILED|ERROR|[0-9]+ (passed|failed)|=+ .*(passed|failed|skipped))" "$log" | cut -c1-200 | tail -25; }
    done
    [ $rc -ne 0 ] || [ ! -e "$logs/failed" ] || rc=1
    rm -rf "$logs"
    exit $rc
}

environment || { echo "gpu_minutes: the bundles could not be unpacked" >&2; exit 2; }
thousandths=$("$base" -c "print(int(float('$scale') * 1000))") || fail "$base does not run" "another Python"
for name in results.jsonl summary.txt log.txt extra.tar.gz; do
    [ ! -e "$out/$name" ] || mv "$out/$name" "$out/$name.before"
done
: > "$out/summary.txt"
printf '{"step": "", "what": "call", "date": "%s", "steps": "%s", "limit": %s, "scale": %s, "tiny": %s}\n' \
    "$(date -u +%Y-%m-%dT%H:%M:%SZ)" "${names[*]}" "$limit" "$scale" "$([ -n "$tiny" ] && echo true || echo false)" \
    > "$out/results.jsonl"
trap finish EXIT
trap stopped INT TERM HUP
for name in "${names[@]}"; do
    case $name in
        1)  run_step facts
            { lane=; trap stopped INT TERM HUP; run_step ipc; run_step server; run_step serverfp8; } &
            lane=$!
            run_step parity; run_step fp8; run_step tests
            wait $lane
            lane= ;;
        2)  for part in train logprobs publish joint accuracy memory; do run_step $part; done ;;
        *)  run_step "$name" ;;
    esac
done
exit 0
