#!/bin/sh
# Make the two interpreters of a GPU machine, the trainer's and SGLang's, and print how to use them.
#
#   tools/gpu_setup.sh DEST                              from the package index, by requirements/
#   tools/gpu_setup.sh DEST --te FILE [--sgl FILE] [--wheels FOLDER]
#                                                        from bundles: tar files of site-packages, for machines
#                                                        without an index that have a fitting torch; the wheels
#                                                        of requirements/gpu-extra.lock for what is not in them
#
# PYTHON names the base interpreter (default python3.12; bundles need one that has torch with CUDA). From the
# index the trainer's set is requirements/cuda-older.lock (torch 2.11, Transformer Engine 2.12, which runs with
# the cuBLAS that torch brings); TRAINER_LOCK=requirements/cuda.lock takes the newer one. Transformer Engine is
# then compiled here (about half an hour). The package called apex in the Python index is another program: it
# is not installed, and `genac doctor` fails where it is. NOT run on a GPU.
#
# Exit code 2: an argument, the interpreter or a file is wrong.
set -eu

say() { echo "gpu_setup: $*" >&2; }
fail() { say "$1"; say "  way out: $2"; exit 2; }

[ $# -ge 1 ] || fail "no folder named" "tools/gpu_setup.sh DEST [--te FILE] [--sgl FILE]"
dest=$1; shift
te=; sgl=; wheels=
while [ $# -gt 0 ]; do
    [ $# -ge 2 ] || fail "$1 needs a file" "tools/gpu_setup.sh DEST --te FILE --sgl FILE"
    case $1 in
        --te) te=$2 ;;
        --sgl) sgl=$2 ;;
        --wheels) wheels=$2 ;;
        *) fail "unknown argument $1" "tools/gpu_setup.sh DEST [--te FILE] [--sgl FILE] [--wheels FOLDER]" ;;
    esac
    [ -r "$2" ] || fail "there is no file $2" "name a bundle, or leave $1 out"
    shift 2
done

root=$(CDPATH= cd -- "$(dirname -- "$0")/.." && pwd)
base=${PYTHON:-python3.12}
command -v "$base" >/dev/null || fail "$base was not found" "PYTHON=/path/to/python3.12 tools/gpu_setup.sh ..."
mkdir -p "$dest"
dest=$(CDPATH= cd -- "$dest" && pwd)

# bundle NAME FILE: DEST/NAME/lib unpacked, and DEST/NAME/venv whose interpreter sees it and the base's packages.
# Through a .pth file, not PYTHONPATH, which the servers' environment is cleaned of.
bundle() {
    [ "$1" = serve ] && inner=sgl || inner=te
    mkdir -p "$dest/$1/lib"
    tar xf "$2" -C "$dest/$1/lib" || fail "$2 cannot be unpacked" "fetch it again"
    [ -d "$dest/$1/lib/$inner" ] || fail "$2 holds no folder $inner" "give the bundle made for --$inner"
    "$base" -m venv --system-site-packages --without-pip "$dest/$1/venv"
    site=$("$dest/$1/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    # Ahead of the base's packages, which may hold other versions of the same ones.
    printf 'import sys; sys.path.insert(1, "%s")\n' "$dest/$1/lib/$inner" > "$site/bundle.pth"
}

if [ -n "$te" ]; then
    say "unpacking the trainer's bundle"
    bundle train "$te"
    if [ -n "$sgl" ]; then
        bundle serve "$sgl"
        # The trainer also needs transformers, tokenizers and safetensors, which the servers' bundle has; it
        # comes last, so that nothing of it hides the trainer's own packages.
        site=$("$dest/train/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        printf '%s\n' "$dest/serve/lib/sgl" > "$site/shared.pth"
    fi
    if [ -n "$wheels" ]; then
        say "installing wheels"
        site=$("$dest/train/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
        "$base" -m pip install --quiet --no-index --no-deps --find-links "$wheels" --target "$site" \
            -r "${EXTRA_LOCK:-$root/requirements/gpu-extra.lock}" ||
            fail "$wheels lacks a wheel of requirements/gpu-extra.lock" "see the lock's head"
    fi
    "$dest/train/venv/bin/python" - >&2 <<'CHECK'
from importlib.util import find_spec

NEEDED = (
    "torch numpy yaml rich psutil jinja2 transformers tokenizers safetensors einops tqdm packaging httpx pytest hypothesis"
)
missing = [name for name in NEEDED.split() if find_spec(name) is None]
if missing:
    print(f"gpu_setup: not here: {', '.join(missing)}")
    print("gpu_setup:   way out: --wheels (the head of requirements/gpu-extra.lock says how), torch by PYTHON=...")
CHECK
else
    lock=${TRAINER_LOCK:-$root/requirements/cuda-older.lock}
    [ -r "$lock" ] || fail "there is no lock $lock" "TRAINER_LOCK=requirements/cuda.lock, or leave it out"
    "$base" -m venv "$dest/train/venv"
    say "installing $lock (Transformer Engine is compiled: about half an hour)"
    NVTE_PYTORCH_FORCE_BUILD=TRUE "$dest/train/venv/bin/python" -m pip install --no-build-isolation -r "$lock"
    "$base" -m venv "$dest/serve/venv"
    say "installing SGLang in an environment of its own"
    "$dest/serve/venv/bin/python" -m pip install "sglang==${SGLANG_VERSION:-0.5.17}"
fi

say "what this machine has:"
PYTHONPATH=$root "$dest/train/venv/bin/python" -m genac_megatron doctor >&2 || say "the doctor found faults, above"
echo "export GENAC_GPU_PYTHON=$dest/train/venv/bin/python"
[ -x "$dest/serve/venv/bin/python" ] && echo "export GENAC_SERVE_PYTHON=$dest/serve/venv/bin/python"
say "then: make test-gpu, make bench-gpu"
