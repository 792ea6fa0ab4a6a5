"""The quickstart over seeds and processor kernels: does the first command hold, whoever types it?

    python tools/quickstart_sweep.py [--seeds 1,2,3,4] [--kernels native,avx2,default] [key.path=value ...]

A run is one seed with one set of kernels: `native`, what this processor has; `avx2`, ATen's AVX2 with MKL's
code for any processor; `default`, ATen's and oneDNN's plainest with the same MKL. Kernels differ in the last
digits of every product, and training carries those into other weights; each run's first losses show that
they do. As many runs go at once as cores allow. What is done is kept in the results file and not run again
unless the recipe or what it extends has changed, or with --again; the same command goes on with one
that was stopped. Which runs are of other code than is here now stands below the table, and --stale runs
those again, one by one: the others stay.

Writes benchmarks/results/quickstart_sweep.json, .md and .png, run by run. Exit code 0: every run ended with 0
and within BOUNDS; 1: one did not; 2: a wrong argument; 130, 143: stopped. key=value go to every run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.machine import cpu_model  # noqa: E402
from genac_megatron.errors import InputError  # noqa: E402
from genac_megatron.observe.runinfo import write_text_atomic  # noqa: E402
from genac_megatron.recipe import document  # noqa: E402
from genac_megatron.recipe.loader import load_recipe  # noqa: E402
from tools.processes import adopt_orphans, end_all  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "quickstart_sweep.json"
RECIPE = ROOT / "recipes" / "quickstart.yaml"
KERNELS = {
    "native": {},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"},
    "default": {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE"},
}
CHOSEN = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS")
POLL_S = 1.0
GRACE_S = 60.0  # for a run that is asked to stop: it saves first
FIRST_LOSSES = 20
CURVES = {
    "actor/heldout_loss": "actor's SFT: loss on held-out demonstrations",
    "critic/heldout_exact_match": "critic's SFT: held-out traces word for word",
}


@dataclass(frozen=True)
class Bound:
    """What README promises of a figure: at least `low`, at most `high`."""

    name: str
    low: float = float("-inf")
    high: float = float("inf")

    def told(self, figures: Mapping[str, Any]) -> str:
        """What is wrong with the figure; "" where nothing is."""
        value = figures.get(self.name)
        if value is None:
            return f"no {self.name}"
        if not self.low <= value <= self.high:
            return f"{self.name} {value:.3f}, not {'>= ' if value < self.low else '<= '}" + (
                f"{self.low:g}" if value < self.low else f"{self.high:g}"
            )
        return ""


BOUNDS = (
    Bound("gain", low=0.15),
    Bound("mse_reinforce", high=0.03),
    Bound("mse_ppo", high=0.03),
    Bound("brier_ratio_reinforce", high=0.75),
    Bound("brier_ratio_ppo", high=0.75),
    Bound("parse_rate", low=0.98),
)
COLUMNS = (
    "seconds", "accuracy_sft", "accuracy_ppo", "gain", "mse_sft", "mse_reinforce", "mse_ppo",
    "brier_ratio_reinforce", "brier_ratio_ppo", "parse_rate", "steps_sft-actor", "steps_sft-critic",
    "memory_gib",
)  # fmt: skip


def figures_of(run: Path) -> dict[str, Any]:
    """A finished run's figures, by BOUNDS' and COLUMNS' names, and its first losses to the last digit."""
    summary = json.loads((run / "report" / "summary.json").read_text(encoding="utf-8"))
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    steps: dict[str, int] = {}
    for row in rows:
        steps[row["stage"]] = max(steps.get(row["stage"], 0), row["step"])
    losses = [row["actor/loss"] for row in rows if row["stage"] == "sft-actor" and "actor/loss" in row]

    def ratio(stage: str, constant: str) -> float | None:
        ours, best = summary.get(f"critic/brier_{stage}"), summary.get(f"critic/{constant}")
        return ours / best if ours is not None and best else None

    return {
        "accuracy_sft": summary["actor/accuracy_sft"],
        "accuracy_ppo": summary["actor/accuracy_ppo"],
        "gain": summary.get("actor/accuracy_gain"),
        **{f"mse_{stage}": summary.get(f"critic/mse_{stage}") for stage in ("sft", "reinforce", "ppo")},
        **{f"brier_{stage}": summary.get(f"critic/brier_{stage}") for stage in ("sft", "reinforce", "ppo")},
        "brier_ratio_reinforce": ratio("reinforce", "brier_constant"),
        "brier_ratio_ppo": ratio("ppo", "brier_constant_ppo"),
        "parse_rate": summary.get("critic/parse_rate"),
        "memory_gib": summary.get("memory/peak_gib"),
        **{f"steps_{stage}": last for stage, last in steps.items()},
        "first_losses": losses[:FIRST_LOSSES],
        "curves": {
            key: [[row["step"], round(row[key], 5)] for row in rows if row.get(key) is not None]
            for key in CURVES
        },
    }


def wrong_with(record: Mapping[str, Any]) -> list[str]:
    """Why a run does not hold; nothing where it does."""
    if record["code"] != 0:
        return [f"exit code {record['code']}"]
    return [text for bound in BOUNDS if (text := bound.told(record))]


def digest(overrides: Sequence[str]) -> str:
    """Of what the recipe sets, not of every default: a new option of a later version changes no run."""
    root = document.read(RECIPE)
    for text in overrides:
        document.override(root, text)
    content = {key: value for key, value in document.plain(root).items() if key != "observe"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def sources() -> str:
    """Of the package's own code: another one may give other figures."""
    found = hashlib.sha256()
    for path in sorted((ROOT / "genac_megatron").rglob("*.py")):
        found.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


@dataclass
class Active:
    seed: int
    kernels: str
    folder: Path
    process: subprocess.Popen[bytes]
    began: float


class Sweep:
    """The runs of a sweep and what is known of them."""

    def __init__(self, results: Path, runs: Path, overrides: Sequence[str], again: bool) -> None:
        self.results, self.runs, self.overrides = results, runs, list(overrides)
        recipe = load_recipe(str(RECIPE), self.overrides)
        self.ranks = recipe.world.ranks
        self.digest, self.sources = digest(self.overrides), sources()
        kept = json.loads(results.read_text(encoding="utf-8")) if results.exists() and not again else {}
        self.records: dict[str, dict[str, Any]] = {
            key: record for key, record in kept.get("runs", {}).items() if record["recipe"] == self.digest
        }

    def has(self, seed: int, kernels: str, *, stale: bool) -> bool:
        """Whether a run need not be run; `stale`: of this code only."""
        record = self.records.get(f"{seed}-{kernels}")
        return record is not None and not (stale and record.get("sources") != self.sources)

    def start(self, seed: int, kernels: str) -> Active:
        folder = self.runs / f"s{seed}-{kernels}"
        if folder.exists():
            shutil.rmtree(folder)  # of a sweep that was stopped
        self.runs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-W", "ignore", "-m", "genac_megatron", "run", str(RECIPE)]
        command += [f"seed={seed}", f"runs={self.runs}", f"name={folder.name}", *self.overrides]
        clean = {key: value for key, value in os.environ.items() if key not in CHOSEN}
        with (self.runs / f"{folder.name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**clean, **KERNELS[kernels], "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
            )
        return Active(seed, kernels, folder, process, time.monotonic())

    def finish(self, active: Active) -> dict[str, Any]:
        """Keep what an ended run gave."""
        record: dict[str, Any] = {
            "seed": active.seed,
            "kernels": active.kernels,
            "recipe": self.digest,
            "sources": self.sources,
            "code": active.process.returncode,
            "seconds": round(time.monotonic() - active.began, 1),
            "load": round(os.getloadavg()[1], 1),
        }
        if (active.folder / "report" / "summary.json").exists():
            record |= figures_of(active.folder)
        self.records[f"{active.seed}-{active.kernels}"] = record
        self.write()
        return record

    def write(self) -> None:
        ordered = dict(sorted(self.records.items(), key=lambda item: (item[1]["seed"], item[1]["kernels"])))
        text = json.dumps({"machine": machine(), "runs": ordered}, indent=1)
        write_text_atomic(self.results, text + "\n")
        write_text_atomic(self.results.with_suffix(".md"), table(ordered.values(), self.sources))
        draw(list(ordered.values()), self.results.with_suffix(".png"))


def machine() -> dict[str, Any]:
    """The processor by name, and its cores."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    best = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "older"
    return {"processor": cpu_model(), "vectors": best, "cores": os.cpu_count()}


def table(records: Iterable[Mapping[str, Any]], code: str) -> str:
    """The runs as a Markdown table, with whether each holds and whether its kernels are its own; and which
    are not of this `code` (`sources`)."""
    rows = list(records)
    native = {row["seed"]: row.get("first_losses") for row in rows if row["kernels"] == "native"}
    names = [name.replace("_", " ") for name in COLUMNS]
    lines = [
        "| seed | kernels | " + " | ".join(names) + " | first loss | holds |",
        "|" + "---|" * (len(COLUMNS) + 4),
    ]
    for row in rows:
        cells = [_cell(row.get(name)) for name in COLUMNS]
        losses = row.get("first_losses") or []
        same = row["kernels"] != "native" and losses and losses == native.get(row["seed"])
        first = (f"{losses[-1]!r}" if losses else "") + (" (as native)" if same else "")
        wrong = "; ".join(wrong_with(row)) or "yes"
        lines.append(f"| {row['seed']} | {row['kernels']} | {' | '.join(cells)} | {first} | {wrong} |")
    held = sum(not wrong_with(row) for row in rows)
    text = "\n".join(lines) + f"\n\n{held} of {len(rows)} hold. First loss: of step {FIRST_LOSSES}.\n"
    old = [f"seed {row['seed']} {row['kernels']}" for row in rows if row.get("sources") != code]
    return text + (
        f"Of other code than the rest (--stale runs them again): {', '.join(old)}.\n" if old else ""
    )


def draw(records: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The runs' held-out curves, those that do not hold in red."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(CURVES), figsize=(11, 4), layout="constrained")
    for ax, (key, title) in zip(axes, CURVES.items(), strict=True):
        for row in records:
            points = row.get("curves", {}).get(key, [])
            colour, alpha = ("#dc2626", 0.9) if wrong_with(row) else ("#2563eb", 0.55)
            ax.plot([p[0] for p in points], [p[1] for p in points], color=colour, alpha=alpha, lw=1.2)
        ax.set(title=title, xlabel="step")
        ax.grid(alpha=0.25)
    axes[0].set_yscale("log")
    axes[1].set_ylim(0, 1)
    held = sum(not wrong_with(row) for row in records)
    figure.suptitle(f"Quickstart over seeds and kernels: {held} of {len(records)} runs hold (blue)")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) and abs(value) < 10 else f"{value:.0f}"


def run_all(
    sweep: Sweep, wanted: Sequence[tuple[int, str]], jobs: int, asked: Sequence[int], *, stale: bool = False
) -> None:
    """Every run that is left, `jobs` at once. Once signals were `asked`, it ends those that go on.

    stale: what other code gave is left, too.
    """
    waiting = [pair for pair in wanted if not sweep.has(*pair, stale=stale)]
    total, active = len(waiting), list[Active]()
    times: list[float] = []
    print(f"[sweep] {len(wanted) - total} of {len(wanted)} runs are done, {jobs} at a time", flush=True)
    try:
        while (waiting or active) and not asked:
            while waiting and len(active) < jobs:
                active.append(sweep.start(*waiting.pop(0)))
            time.sleep(POLL_S)
            for one in [one for one in active if one.process.poll() is not None]:
                active.remove(one)
                end_all({other.process.pid for other in active})  # what it left, where it was killed
                record = sweep.finish(one)
                times.append(record["seconds"])
                wrong = "; ".join(wrong_with(record)) or "holds"
                left = (len(waiting) + len(active)) * sum(times) / len(times) / jobs
                print(
                    f"[sweep] seed {one.seed}, {one.kernels}: {wrong}, {record['seconds']:.0f} s; "
                    f"{total - len(waiting) - len(active)} of {total}, eta {left / 60:.0f} min",
                    flush=True,
                )
    finally:
        _stop(active, asked)


def _stop(active: Sequence[Active], asked: Sequence[int]) -> None:
    """Ask runs to save and end; after a while, or a second signal, end them and all that they started."""
    for one in active:
        one.process.send_signal(signal.SIGINT)
    until = time.monotonic() + GRACE_S
    while any(one.process.poll() is None for one in active):
        if time.monotonic() > until or len(asked) > 1:
            break
        time.sleep(POLL_S)
    for words in end_all():
        print(f"[sweep] ended: {words}", flush=True)
    for one in active:
        if one.process.poll() is None:  # where descendants cannot be found; its ranks end with it
            one.process.kill()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="1,2,3,4", help="numbers, divided by commas")
    parser.add_argument("--kernels", default=",".join(KERNELS), help="of " + ", ".join(KERNELS))
    parser.add_argument("--jobs", type=int, help="runs at once; otherwise as many as cores allow")
    parser.add_argument("--runs", type=Path, default=Path("runs/quickstart-sweep"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--again", action="store_true", help="forget the results that are there")
    parser.add_argument("--stale", action="store_true", help="run again what other code gave")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    options = parser.parse_args(arguments)
    try:
        options.seeds = [int(word) for word in options.seeds.split(",")]
    except ValueError:
        parser.error(f"--seeds are numbers, divided by commas, not {options.seeds}")
    options.kernels = options.kernels.split(",")
    if unknown := sorted(set(options.kernels) - set(KERNELS)):
        parser.error(f"--kernels are {', '.join(KERNELS)}, not {', '.join(unknown)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        sweep = Sweep(options.results, options.runs.absolute(), options.overrides, options.again)
    except InputError as error:
        print(f"[sweep] {error}", file=sys.stderr)
        return error.exit_code
    adopt_orphans()  # ranks whose launcher is killed
    asked: list[int] = []

    def stop(number: int, _frame: object) -> None:
        asked.append(number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, stop)
    wanted = [(seed, kernels) for seed in options.seeds for kernels in options.kernels]
    jobs = options.jobs or max(1, (os.cpu_count() or 1) // sweep.ranks)
    run_all(sweep, wanted, jobs, asked, stale=options.stale)
    if asked:
        print("[sweep] stopped; the same command goes on", flush=True)
        return 128 + asked[0]
    chosen = [sweep.records[f"{seed}-{kernels}"] for seed, kernels in wanted]
    print(table(chosen, sweep.sources), flush=True)
    return 0 if all(not wrong_with(record) for record in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
