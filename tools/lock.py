"""Resolve requirements/cpu.lock and cpu-next.lock anew from pyproject.toml (`make lock`, Python 3.11).

What decides which code runs (torch, megatron-core, transformers) stays at the version of the present lock:
to raise one, change its line there first. Everything else becomes the newest version in its range. A lock's
head comment, and the tags behind a pin, are kept. Standard library and pip only.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "requirements"
HELD = ("torch", "megatron-core", "transformers")
NEXT_OWN = ("megatron-core", "pybind11", "triton")  # pins that cpu-next.lock does not share with cpu.lock
ALSO = ("setuptools",)  # torch's compiler and source builds import it


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read(path: Path) -> tuple[str, dict[str, str]]:
    """A lock's head comment, and its lines by normal name."""
    lines = path.read_text().splitlines()
    head = [line for line in lines if line.startswith("#")]
    return "\n".join(head) + "\n", {normal(line.split("==")[0]): line for line in lines if "==" in line}


def resolve(wanted: list[str]) -> dict[str, str]:
    """What pip would install for these requirements: version by name, local build tags left out."""
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    done = subprocess.run([*command, "--report", "-", *wanted], stdout=subprocess.PIPE, text=True, check=True)
    installs = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    return {item["name"]: item["version"].partition("+")[0] for item in installs}


def write(path: Path, head: str, lines: dict[str, str]) -> None:
    path.write_text(head + "".join(f"{lines[name]}\n" for name in sorted(lines)))


def main() -> int:
    if sys.version_info[:2] != (3, 11):
        print("the CPU locks are for Python 3.11: run this with it", file=sys.stderr)
        return 2
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    head, old = read(LOCKS / "cpu.lock")
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"], *ALSO]
    pins = resolve([*wanted, *(old[name].partition("#")[0].strip() for name in HELD)])
    new = {}
    for name, version in pins.items():
        _, hash_sign, tag = old.get(normal(name), "").partition("#")
        new[normal(name)] = f"{name}=={version}" + (f"  #{tag}" if hash_sign else "")
    write(LOCKS / "cpu.lock", head, new)
    head, old_next = read(LOCKS / "cpu-next.lock")
    write(LOCKS / "cpu-next.lock", head, new | {name: old_next[name] for name in NEXT_OWN})
    changed = sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))
    print(f"{len(new)} pins; changed: {', '.join(changed) or 'none'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
