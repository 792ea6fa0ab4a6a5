"""A long run of quickstart steps, killed again and again: nothing lost, nothing left, no memory that grows.

Joint PPO of the quickstart's models on two ranks, in attempts of random length. Each ends by USR1 to the
launcher, kill -9 of a random rank or kill -9 of the launcher, and the next one resumes. Checked:

- after every attempt: within a minute no process of it is alive; after USR1 and after the launcher's death,
  which its ranks notice, the newest checkpoint is at the last logged step, after a rank's death at most
  `checkpoint.every` steps before it;
- at the end: every step of every stage is in metrics.jsonl exactly once, in order;
- memory: in every attempt that makes at least WARM + FEWEST steps of its last stage, the launcher's and each
  rank's mean RSS over the last third of these is at most 5 % above that over the first third, the first WARM
  left out: a stage makes its optimizer's states, allocators and caches fill, and a batch's longest sequences
  move a rank by some per cent from one step to the next. So that there is always one such attempt, the last
  goes on until it has made STEADY steps.
  Helpers (writers of checkpoints) live for a moment: what is told is how many there were at most.

Run: python tools/soak.py --minutes 60 (make soak MINUTES=60). Code 1 where a check fails; --save writes
benchmarks/results/soak.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
MARK = "GENAC_SOAK"
HELPERS = "helpers"
FLAT = 1.05
GONE_S, START_S, SAMPLE_S = 60.0, 300.0, 2.0
WARM, FEWEST, STEADY = 20, 60, 200  # steps of an attempt
STEADY_S = 2400.0  # at most, for the last attempt
EVERY = 5
RECIPE = """\
extends: {root}/recipes/quickstart.yaml
name: soak
stages:
  - {{kind: sft, name: sft-actor, role: actor, data: demonstrations, size: 1600, epochs: 1, batch: 16,
     optimizer: &sft {{lr: 4.0e-3, schedule: cosine, warmup_steps: 20, beta2: 0.98}},
     rollout: &rollout {{prompts: 32, samples: 4, max_new_tokens: 64}}}}
  - {{kind: sft, name: sft-critic, role: critic, start_from: actor, data: traces, size: 800, epochs: 1,
     batch: 16, optimizer: *sft, rollout: *rollout, gate: {{action: "off"}}}}
  - {{kind: ppo, steps: 1000000, rollout: *rollout, eval_every: 50,
     actor_optimizer: {{lr: 1.0e-5, weight_decay: 0.0}}, critic_optimizer: {{lr: 3.0e-5, weight_decay: 0.0}}}}
evaluation: {{prompts: 32, samples: 2, mc_states: 0}}
checkpoint: {{every: {every}}}
"""
STAGES = ("sft-actor", "sft-critic", "ppo")
KINDS = ("usr1", "rank", "launcher")
CODES = {"usr1": 75, "rank": 4, "launcher": -signal.SIGKILL}

Sample = tuple[int, int, dict[str, float]]  # stage, steps of it that an attempt had made, bytes by process


@dataclass
class Attempt:
    """One launcher's life."""

    kind: str
    seconds: float = 0.0
    code: int = 0
    first: int = 0  # steps of the run that were done before
    last: int = 0  # and after, as logged
    saved: int = 0  # by the newest checkpoint
    memory: dict[str, float] = field(default_factory=dict)  # process: last third's RSS over the first's
    peak_mib: float = 0.0  # of one process
    helpers: int = 0  # at one moment, at most
    faults: list[str] = field(default_factory=list)


class Soak:
    """The run folder and what was seen."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.rng = folder, random.Random(seed)
        self.run = folder / "runs" / "soak"
        self.attempts: list[Attempt] = []
        (folder / "recipe.yaml").write_text(RECIPE.format(root=ROOT, every=EVERY))

    # --- one attempt -----------------------------------------------------------------------------

    def attempt(self, kind: str, seconds: float, least: int = 0) -> Attempt:
        """Start or resume, wait for a step and for `seconds`, end it as `kind` says, look at what is left.

        least: or until so many steps are made, in at most STEADY_S.
        """
        made = Attempt(kind, first=len(self.steps()))
        mark = str(uuid.uuid4())
        process = self.start(mark)
        try:
            self.until(lambda: len(self.steps()) > made.first or self.finished(process), START_S)
            began, samples = time.monotonic(), list[Sample]()
            while process.poll() is None:
                rows, spent = self.steps()[made.first :], time.monotonic() - began
                if spent >= seconds and (len(rows) >= least or spent >= STEADY_S):
                    break
                stage = rows[-1][0] if rows else -1
                samples.append((stage, sum(row[0] == stage for row in rows), rss(process.pid)))
                time.sleep(SAMPLE_S)
            made.seconds = time.monotonic() - began
            if process.poll() is None:
                self.end(process, kind)
            made.code = process.wait(GONE_S * 5)
        finally:
            process.kill()
        self.judge(made, mark, samples)
        self.attempts.append(made)
        return made

    def start(self, mark: str) -> subprocess.Popen[bytes]:
        resume = ["--resume"] if list(self.run.glob("checkpoints/*/manifest.json")) else []
        command = [sys.executable, "-m", "genac_megatron", "run", "recipe.yaml", *resume]
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", MARK: mark}
        with (self.folder / "output.log").open("ab") as output:
            return subprocess.Popen(
                command, cwd=self.folder, env=environ, stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    def end(self, process: subprocess.Popen[bytes], kind: str) -> None:
        if kind == "usr1":
            process.send_signal(signal.SIGUSR1)
        elif kind == "launcher":
            process.kill()
        else:
            self.rng.choice(psutil.Process(process.pid).children()).kill()

    def judge(self, made: Attempt, mark: str, samples: list[Sample]) -> None:
        alive = self.outlived(mark)
        rows = self.steps()
        made.last = len(rows)
        made.saved = sum(1 for at in rows if at <= self.saved_at(rows))
        if made.code != CODES[made.kind]:
            made.faults.append(f"ended with code {made.code} after {made.kind}")
        if alive:
            made.faults.append(f"left {len(alive)} process(es): {alive[:3]}")
        if made.kind != "rank" and made.saved != made.last:
            made.faults.append(f"{made.last - made.saved} step(s) not saved although it was asked to stop")
        if made.last - made.saved > EVERY:
            made.faults.append(f"{made.last - made.saved} steps to be done again")
        made.helpers = int(max((sample.get(HELPERS, 0.0) for *_, sample in samples), default=0.0))
        sizes = (size for *_, sample in samples for name, size in sample.items() if name != HELPERS)
        made.peak_mib = max(sizes, default=0.0) / 2**20
        made.memory = growth(samples)
        made.faults += [f"{k}: RSS times {v:.3f}" for k, v in made.memory.items() if v > FLAT]

    # --- what the run left -----------------------------------------------------------------------

    def steps(self) -> list[tuple[int, int]]:
        """(stage's number, step) of every step in metrics.jsonl, in order; a stage's closing row is none."""
        path = self.run / "metrics.jsonl"
        found: list[tuple[int, int]] = []
        for line in path.read_text().splitlines() if path.exists() else []:
            try:
                row = json.loads(line)
            except ValueError:
                continue  # being written
            if any(key.endswith("/grad_norm") for key in row):
                found.append((STAGES.index(row["stage"]), int(row["step"])))
        return found

    def saved_at(self, rows: list[tuple[int, int]]) -> tuple[int, int]:
        """Where the newest checkpoint stands."""
        best = (0, -1, 0)
        for path in self.run.glob("checkpoints/[!.]*/manifest.json"):
            manifest = json.loads(path.read_text())
            stage, step = manifest["state"]["position"]
            best = max(best, (manifest["serial"], STAGES.index(stage), step))
        return best[1:]

    def doubled_or_lost(self) -> list[str]:
        """What is wrong with the order of the steps."""
        rows, wrong = self.steps(), []
        for before, after in itertools.pairwise(rows):
            if after not in ((before[0], before[1] + 1), (before[0] + 1, 1)):
                wrong.append(f"step {after} follows {before}")
        return wrong[:5] + (["the first step is missing"] if rows[:1] != [(0, 1)] else [])

    def finished(self, process: subprocess.Popen[bytes]) -> bool:
        return process.poll() is not None

    def until(self, done: Callable[[], bool], limit_s: float) -> None:
        give_up = time.monotonic() + limit_s
        while not done():
            if time.monotonic() > give_up:
                raise SystemExit(f"no step within {limit_s:.0f} s: see {self.folder}/output.log")
            time.sleep(0.5)

    def outlived(self, mark: str) -> list[str]:
        give_up = time.monotonic() + GONE_S
        while (alive := list(marked(mark))) and time.monotonic() < give_up:
            time.sleep(0.5)
        return alive


def rss(pid: int) -> dict[str, float]:
    """Bytes of the launcher ("launcher") and its ranks ("rank 0"); how many helpers these have (HELPERS)."""
    found: dict[str, float] = {}
    try:
        launcher = psutil.Process(pid)
        found["launcher"] = launcher.memory_info().rss
        for child in launcher.children():
            found[f"rank {child.environ().get('RANK')}"] = child.memory_info().rss
            found[HELPERS] = found.get(HELPERS, 0.0) + len(child.children(recursive=True))
    except psutil.Error:
        pass  # it ends just now
    return found


def growth(samples: list[Sample]) -> dict[str, float]:
    """Per process, the mean RSS over the last third of warm steps over that of the first third.

    Of an attempt's last stage alone. Empty where it made fewer than FEWEST warm steps of it.
    """
    stage, last = max(((stage, steps) for stage, steps, _ in samples), default=(-1, 0))
    if last < WARM + FEWEST:
        return {}
    third = (last - WARM) / 3
    mine = [(steps, sizes) for at, steps, sizes in samples if at == stage]
    early = [sizes for steps, sizes in mine if WARM <= steps < WARM + third]
    late = [sizes for steps, sizes in mine if steps > last - third][:-1]  # the very last: it may be ending
    found = {}
    for name in sorted(set().union(*early, *late) - {HELPERS}):
        means = [
            sum(s[name] for s in part if name in s) / max(1, sum(name in s for s in part))
            for part in (early, late)
        ]
        if all(means):
            found[name] = means[1] / means[0]
    return found


def marked(mark: str) -> Iterator[str]:
    """Living processes that carry an attempt's mark."""
    wanted = f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                yield (
                    f"{folder.name} " + (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:100]
                )
        except OSError:
            continue


def told(attempt: Attempt) -> str:
    memory = ", ".join(f"{name} x{value:.3f}" for name, value in attempt.memory.items()) or "too few steps"
    return (
        f"{attempt.kind:>8} after {attempt.seconds:4.0f} s: code {attempt.code}, steps {attempt.first} to "
        f"{attempt.last}, saved {attempt.saved}, peak {attempt.peak_mib:.0f} MiB, "
        f"{attempt.helpers} helpers, memory {memory}"
        + "".join(f"\n  WRONG: {fault}" for fault in attempt.faults)
    )


def summary(soak: Soak, minutes: float) -> dict[str, Any]:
    attempts = soak.attempts
    ratios = [value for attempt in attempts for value in attempt.memory.values()]
    return {
        "minutes": round(minutes, 1),
        "attempts": len(attempts),
        **{f"ended by {kind}": sum(attempt.kind == kind for attempt in attempts) for kind in KINDS},
        "steps": len(soak.steps()),
        "steps done again": sum(attempt.last - attempt.saved for attempt in attempts[:-1]),
        "attempts whose memory was judged": sum(bool(attempt.memory) for attempt in attempts),
        "most helpers": max((attempt.helpers for attempt in attempts), default=0),
        "largest growth of RSS": round(max(ratios), 4) if ratios else None,
        "wrong": sum(len(attempt.faults) for attempt in attempts) + len(soak.doubled_or_lost()),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill and resume quickstart steps for a while.")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--shortest", type=float, default=20.0, help="seconds of an attempt")
    parser.add_argument("--longest", type=float, default=300.0)
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/soak.json")
    options = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):  # from a shell's background SIGINT would be ignored
        signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="genac-soak-") as folder:
        soak = Soak(Path(folder), options.seed)
        while (left := options.minutes * 60 - (time.monotonic() - began)) > 0:
            kind = KINDS[len(soak.attempts) % len(KINDS)]  # in turn, so that each occurs
            seconds = soak.rng.uniform(options.shortest, max(options.shortest, options.longest))
            print(told(soak.attempt(kind, min(seconds, max(left, options.shortest)))), flush=True)
        print(told(soak.attempt("usr1", options.shortest, STEADY)), flush=True)
        for text in soak.doubled_or_lost():
            print(f"WRONG: {text}")
        figures = summary(soak, (time.monotonic() - began) / 60)
    print(json.dumps(figures, indent=1))
    if options.save:
        sys.path.insert(0, str(ROOT))
        from benchmarks.machine import save

        print(save("soak", {"every": EVERY, **vars(options)}, [asdict(attempt) for attempt in soak.attempts]))
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
