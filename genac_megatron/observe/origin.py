"""What a run comes from: its command line, recipe files, code, packages and host. No torch."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from genac_megatron import __version__

TYPED = "GENAC_TYPED"  # how the command was begun: "make quickstart", or what stands before "run"
PACKAGES = (
    "torch", "megatron-core", "transformers", "tokenizers", "safetensors", "numpy", "pydantic", "datasets",
    "math-verify", "reasoning-gym", "transformer-engine",
)  # fmt: skip
HOME = Path(__file__).resolve().parents[2]  # of the package: a clone, or site-packages
GIT_S = 10.0  # that git may take
CHANGED = 20  # files that are named


@dataclass(frozen=True)
class Origin:
    """What a run was asked for. words: the command's, "run" and the recipe first or among them."""

    words: Sequence[str]
    recipe: str = ""
    overrides: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)  # the recipe's and what it extends: their text

    def row(self) -> dict[str, Any]:
        """All of it with what is here, as plain data."""
        job, restart = job_and_restart()
        return {
            "command": again(self.words, self.recipe),
            "words": list(self.words),
            "recipe": self.recipe,
            "overrides": list(self.overrides),
            "files": dict(self.files),
            "folder": os.getcwd(),
            **code(),
            "packages": packages(),
            "python": platform.python_version(),
            "host": socket.gethostname(),
            "system": platform.platform(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "job": job,
            "restart": restart,
        }


def job_and_restart(environ: Mapping[str, str] = os.environ) -> tuple[str | None, int]:
    """The Slurm job's number, None outside one, and how often Slurm has started it again."""
    return environ.get("SLURM_JOB_ID"), int(environ.get("SLURM_RESTART_COUNT") or 0)


def typed(environ: Mapping[str, str] = os.environ, argv: Sequence[str] | None = None) -> str:
    """What stands before the command's first word when a person types it again."""
    if environ.get(TYPED):
        return environ[TYPED]
    argv = sys.orig_argv if argv is None else argv
    if any(Path(word).name == "genac" for word in argv[:2]):
        return "genac"
    found = environ.get("PYTHONPATH", "").split(os.pathsep)
    path = next((one for one in found if one and Path(one).resolve() == HOME), None)
    begin = f"PYTHONPATH={shlex.quote(path)} " if path is not None else ""
    return f"{begin}{shlex.quote(argv[0])} -m genac_megatron"


def again(words: Sequence[str], recipe: str, *more: str, before: str | None = None) -> str:
    """The command with further words, as it is typed into a shell where this one was.

    A target of make names the recipe itself; all else goes into its ARGS.
    before: as `typed` gives it, which it is where none is given.
    """
    before = typed() if before is None else before
    asked = [*words, *(word for word in more if word not in words)]
    if not before.startswith("make "):
        return f"{before} {shlex.join(asked)}"
    named = () if before == "make genac" else ("run", recipe)
    own = [word for word in asked if word not in named]
    return f"{before} ARGS={shlex.quote(shlex.join(own).replace('$', '$$'))}" if own else before


def code(home: Path = HOME) -> dict[str, Any]:
    """The package's version, and the commit of the clone that it is in or was installed from.

    dirty: whether tracked files differ from the commit; `changes` is then a digest of the differences.
    """
    found: dict[str, Any] = {"version": __version__, "commit": None, "dirty": None}
    top = _git(home, "rev-parse", "--show-toplevel") if (home / ".git").exists() else None
    if top is None:
        return found | _installed_from()
    changed = _git(home, "status", "--porcelain", "--untracked-files=no")
    found |= {"commit": _git(home, "rev-parse", "HEAD"), "dirty": None if changed is None else bool(changed)}
    if changed:
        names = [line[3:] for line in changed.splitlines()]
        difference = _git(home, "diff", "HEAD") or ""
        found["changed"] = [
            *names[:CHANGED],
            *([f"and {len(names) - CHANGED} more"] if names[CHANGED:] else []),
        ]
        found["changes"] = hashlib.sha256(difference.encode("utf-8", "replace")).hexdigest()
    return found


def _git(folder: Path, *words: str) -> str | None:
    """What git says; None where it is not there or says no."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *words],
            capture_output=True, text=True, errors="replace", timeout=GIT_S, check=False,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.rstrip("\n") if done.returncode == 0 else None


def _installed_from() -> dict[str, Any]:
    """The commit that pip noted, where it installed the package from a repository."""
    try:
        text = importlib.metadata.distribution("genac-megatron").read_text("direct_url.json")
        commit = json.loads(text or "{}").get("vcs_info", {}).get("commit_id")
    except (importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        return {}
    return {"commit": commit, "dirty": False} if commit else {}


def packages() -> dict[str, str]:
    """Versions of what results go by, and of what runs under other interpreters, where they are named."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    serve = os.environ.get("GENAC_SERVE_PYTHON")
    if serve:
        for info in sorted(Path(serve).parent.parent.glob("lib/python3*/site-packages/sglang-*.dist-info")):
            found["sglang (servers)"] = info.name.removeprefix("sglang-").removesuffix(".dist-info")
    if theirs := os.environ.get("GENAC_ENVIRONMENTS_PYTHON"):
        for name in ("verifiers", "textarena"):
            infos = Path(theirs).parent.parent.glob(f"lib/python3*/site-packages/{name}-*.dist-info")
            found |= {f"{name} (environments)": one.name.split("-")[1].removesuffix(".dist") for one in infos}
    return found
