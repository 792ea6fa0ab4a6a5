"""The library: recipes, runs and their figures, conversions, from a program or a notebook. No torch here.

What it does is what the command line does, by the same functions; a run's ranks are processes of their own.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genac_megatron.errors import (
    EXIT_GATE,
    EXIT_INPUT,
    EXIT_LOST,
    EXIT_OK,
    EXIT_REQUEUE,
    GateFailed,
    GenacError,
    InputError,
    PeerLost,
    StopRequested,
)
from genac_megatron.evaluation.transcripts import ScoreOptions, need_scorable
from genac_megatron.launch import Launcher, rank_command
from genac_megatron.observe.history import attempts, history, meaning
from genac_megatron.observe.report import write_report
from genac_megatron.observe.runinfo import EVALUATIONS, METRICS, ROLLOUTS, RunFolder, read_jsonl, run_path
from genac_megatron.recipe.loader import dump_recipe, load_recipe
from genac_megatron.recipe.schema import Recipe, TeacherConfig
from genac_megatron.stages.inputs import need_inputs
from genac_megatron.watch.compare import Comparison
from genac_megatron.watch.compared import compare_runs

if TYPE_CHECKING:
    import pandas as pd

__all__ = [
    "Comparison",
    "FinishedRun",
    "GenacError",
    "Recipe",
    "compare",
    "dump_recipe",
    "load_recipe",
    "open_run",
    "run",
    "score",
    "to_hf",
    "to_megatron",
]
KINDS = {EXIT_INPUT: InputError, EXIT_GATE: GateFailed, EXIT_LOST: PeerLost, EXIT_REQUEUE: StopRequested}


@dataclass(frozen=True)
class FinishedRun:
    """A run folder: what is in it as plain data and data frames. Of a run that goes on, what is there yet."""

    path: Path

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe as plain data."""
        return RunFolder(self.path).resolved_recipe()

    @property
    def ended(self) -> str | None:
        """How its last attempt ended, in words ("done"); None while it goes on, or where it was killed."""
        found = attempts(history(RunFolder(self.path)))
        end = found[-1][1] if found else None
        return None if end is None else meaning(int(end["code"]))

    @property
    def summary(self) -> dict[str, Any]:
        """The figures of report/summary.json, made anew where the run has gone on since."""
        path = self.path / "report" / "summary.json"
        log = self.path / METRICS
        if path.exists() and (not log.exists() or path.stat().st_mtime >= log.stat().st_mtime):
            summary: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return summary
        return write_report(self.path, draw=False)

    def report(self) -> Path:
        """Write report/index.html with its plots; its path."""
        write_report(self.path)
        return self.path / "report" / "index.html"

    def figures(self) -> pd.DataFrame:
        """A row per step: stage, kind, step, time (seconds since 1970) and a column per figure."""
        return self._frame(METRICS)

    def evaluations(self) -> pd.DataFrame:
        """A row per held-out evaluation; figures as columns such as actor.accuracy and critic.brier."""
        return self._frame(EVALUATIONS)

    def rollouts(self) -> pd.DataFrame:
        """A row per kept rollout: problem, response, outcome, and `states`, what the critic said of each."""
        return self._frame(ROLLOUTS)

    def _frame(self, log: str) -> pd.DataFrame:
        import pandas as pd  # half a second

        return pd.json_normalize(RunFolder(self.path).rows(log)[0])


def open_run(path: str | Path) -> FinishedRun:
    """A run folder to read. Raises InputError where it is none."""
    folder = RunFolder(path)
    if not folder.recipe.exists() and not (folder.path / METRICS).exists():
        raise InputError("no run there", where=str(path), way_out="give the folder of a run: runs/<name>")
    return FinishedRun(folder.path)


def compare(runs: Sequence[str | Path], *, unfinished: bool = False) -> Comparison:
    """Run folders beside each other, the first one being what others are compared with, as `genac compare`.

    unfinished: runs that go on or failed are taken as far as they are. Raises InputError.
    """
    return compare_runs([Path(run) for run in runs], unfinished=unfinished)


def run(
    recipe: str | Path, overrides: Sequence[str] = (), *, resume: bool = False, quiet: bool = False
) -> FinishedRun:
    """Run a recipe file to its end, on ranks that are started for it, as `genac run`; its folder.

    overrides: "key.path=value". quiet: what the run says is shown only where it fails.
    Raises InputError before anything is begun, and at a failed end GateFailed (what is trained is saved),
    StopRequested (it can be resumed), PeerLost, or another GenacError, with the run's last words.
    """
    asked = load_recipe(recipe, overrides)
    need_inputs(asked, resume=resume, planning=False)  # the command asks endpoints
    words = ["run", str(recipe), *overrides, *(["--resume"] if resume else [])]
    done = _command(words, quiet=quiet)
    folder = RunFolder(run_path(asked))
    if done.returncode == EXIT_OK:
        return FinishedRun(folder.path)
    raise _failure(folder, done.returncode, done.stderr or "")


def _failure(folder: RunFolder, code: int, said: str) -> GenacError:
    """What a run ended with, by the words that it noted or said."""
    found = attempts(history(folder))
    end = found[-1][1] if found else None
    told = said.strip() or str((end or {}).get("told") or "") or meaning(code)
    return KINDS.get(code, GenacError)(told, where=str(folder.path))


def score(
    transcripts: str | Path | Sequence[Mapping[str, Any]],
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    checkpoint: str | Path | None = None,
    p_bar: float | None = None,
    step: int | None = None,
    limit: int = 4096,
    judgements: int = 1,
    lines: bool = False,
    url: str | None = None,
    model: str | None = None,
    api_key_env: str | None = None,
    quiet: bool = False,
) -> pd.DataFrame:
    """A critic's values of any transcripts, as `genac score`: the rows, with value, and values of prefixes.

    transcripts: a JSONL file, or its rows: problem and response, or messages. checkpoint: the critic's (a run
    folder: its newest). p_bar, step: what it is told of the actor; None: as its run told it. limit: tokens
    that a response may have. judgements: of a state, whose mean counts. lines: prefixes at line ends, too.
    url, model, api_key_env: a server that has the critic, in the place of ranks that are started here. out: a
    file for the rows; the same call goes on from what is kept beside it.
    Raises InputError before anything is begun, or where nothing that it says is a score, and PeerLost.
    """
    import pandas as pd  # half a second

    with tempfile.TemporaryDirectory(prefix="genac-score-") as made:
        source, target = Path(made) / "transcripts.jsonl", Path(out or Path(made) / "scored.jsonl")
        if isinstance(transcripts, str | Path):
            source = Path(transcripts)
        else:
            rows = [json.dumps(dict(row)) for row in transcripts]
            source.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        named = None if checkpoint is None else str(checkpoint)
        wanted = ScoreOptions(source, target, named, p_bar, step, limit, judgements, lines)
        asked = load_recipe(recipe, overrides)
        need_scorable(asked, wanted)
        if url is not None and not model:
            raise InputError(f"which model of {url}?", where="--url", way_out="name it by --model")
        if url is None:
            words = ["score", str(source), str(recipe), *overrides, *_score_words(wanted)]
            _in_ranks(asked, words, quiet=quiet)
        else:
            teacher = TeacherConfig(kind="endpoint", url=url, model=model, api_key_env=api_key_env)
            teacher = teacher.model_copy(update={"temperature": asked.judging.temperature})
            _by_server(asked, wanted, teacher, quiet=quiet)
        return pd.DataFrame(read_jsonl(target)[0])


def _score_words(wanted: ScoreOptions) -> list[str]:
    """The options of `genac score` that say the same."""
    named = {
        "--out": wanted.out,
        "--checkpoint": wanted.checkpoint,
        "--p-bar": wanted.p_bar,
        "--step": wanted.step,
        "--limit": wanted.limit,
        "--judgements": wanted.judgements,
    }
    words = [word for name, value in named.items() if value is not None for word in (name, str(value))]
    return words + ["--lines"] * wanted.lines


def _by_server(recipe: Recipe, wanted: ScoreOptions, teacher: TeacherConfig, *, quiet: bool) -> None:
    from genac_megatron.evaluation.score import score_by_server  # torch

    line = score_by_server(recipe, wanted, teacher)
    if not quiet:
        print(line, flush=True)


def _in_ranks(recipe: Recipe, words: Sequence[str], *, quiet: bool) -> None:
    """`genac WORDS` on ranks that are started here. Raises what it ends with."""
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        launcher = Launcher(
            rank_command(words),
            recipe.world.ranks,
            recipe.world.threads,
            errors=errors if quiet else None,
            environ=_environment(),
        )
        code = launcher.run()
        errors.seek(0)
        said = errors.read().strip().removeprefix("genac: error: ")
    if code != EXIT_OK:
        error = KINDS.get(code, GenacError)(said or meaning(code), where=str(run_path(recipe)))
        error.told, error.exit_code = not quiet, code
        raise error


def to_hf(checkpoint: str | Path, folder: str | Path, role: str = "actor", *, dtype: str = "keep") -> Path:
    """Write a role as a Hugging Face folder, as `genac convert to-hf`; the folder.

    checkpoint: one, or a run folder: its newest. dtype: keep, fp32 or bf16. Raises InputError.
    """
    _converted("to-hf", checkpoint, folder, "--role", role, "--dtype", dtype)
    return Path(folder)


def to_megatron(hf: str | Path, folder: str | Path, *, dtype: str = "keep") -> Path:
    """Make a checkpoint of a Hugging Face folder, as `genac convert to-megatron`; its folder.

    A role starts from it by `model: {checkpoint: folder}`. Raises InputError.
    """
    _converted("to-megatron", hf, folder, "--dtype", dtype)
    return Path(folder)


def _converted(direction: str, *words: str | Path) -> None:
    """One conversion, in a process of its own: it loads Megatron."""
    done = _command(["convert", direction, *map(str, words), "--quiet"], quiet=True)
    if done.returncode:
        raise KINDS.get(done.returncode, GenacError)(done.stderr.strip().removeprefix("genac: error: "))


def _command(words: Sequence[str], *, quiet: bool) -> subprocess.CompletedProcess[str]:
    """`genac WORDS` by this interpreter and this package, to its end."""
    return subprocess.run(
        rank_command(words),
        env=_environment(),
        stdout=subprocess.DEVNULL if quiet else None,
        stderr=subprocess.PIPE if quiet else None,
        text=True,
        check=False,
    )


def _environment() -> dict[str, str]:
    """This process's, in which this package is found: a program may have it by a path of its own."""
    package = str(Path(__file__).resolve().parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
