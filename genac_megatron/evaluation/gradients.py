"""`genac evaluate gradients`: how good estimators of a frozen actor's gradient are (docs/evaluation.md).

OUT/
    gradients.jsonl  per chunk of the reference, per block of batches: outcomes, inner products of gradients
    manifest.json    what made them, and the inner products between chunks and between blocks
    figures.json     figures with intervals (evaluation/gradient_figures.py); table.md, gradients.png
    vectors/         gradients of what is done so far, a rank's part each, while it works (plan.json, parts/)

Gradients are whole and exact: one backward pass each, by the actor's own role in its own layout, whose
inner products are summed over ranks. So disk holds a copy of the weights in fp32 per chunk of the reference
and, for each estimator, one per block: for models of some ten million weights at most.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from genac_megatron import __version__
from genac_megatron.algorithms.losses import make_ppo_loss
from genac_megatron.critic.icc import IccState
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.evaluation.bank import rendered_digest, texts_digest
from genac_megatron.evaluation.estimators import (
    RAW,
    Estimator,
    Played,
    Source,
    choose,
    exact_batch,
    reference_samples,
    sources_of,
)
from genac_megatron.evaluation.gradient_report import write_report
from genac_megatron.evaluation.parts import Key, Parts, Row
from genac_megatron.evaluation.session import (
    identity,
    made_from,
    own_code,
    stop_if_asked,
    template_digest,
    with_roles,
)
from genac_megatron.metrics import Floats
from genac_megatron.models.sizes import parameters
from genac_megatron.observe.manifest import find_checkpoint, read_manifest
from genac_megatron.recipe.schema import Recipe, RolloutConfig
from genac_megatron.records import Rollout, Sample
from genac_megatron.stages.batch import Batch, gathered_batch, play, train_prompts
from genac_megatron.stages.heldout import told_step
from genac_megatron.stages.rollouts import Asked
from genac_megatron.stages.runtime import Run, mean
from genac_megatron.stages.session import session
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.tasks.tokenizer import prints_date
from genac_megatron.training.agreement import from_first, gathered
from genac_megatron.training.layout import World
from genac_megatron.training.loading import load_checkpoint

FORMAT = 1
ROWS, VECTORS = "gradients.jsonl", "vectors"
REFERENCE, BATCHES = 0, 1  # kinds of rows
SCALAR = "scalar"  # the role of a scalar critic, beside the generative `critic`
PARTED = ("distributed_optimizer", "overlap_grad_reduce")  # of the actor's training
BLOCKS = 20  # at most: clusters of the intervals, and what is lost where it is killed


@dataclass(frozen=True)
class GradientOptions:
    """What is sampled and estimated."""

    out: Path
    checkpoint: str | None = None  # the actor's; None: the recipe's model
    critic: str | None = None  # a run with a generative critic; None: the recipe's, if it has weights
    scalar: str | None = None  # a run whose critic is a scalar one
    reference: int = 8192  # rollouts, one to a prompt
    chunks: int = 16  # of the reference
    batches: int = 200
    prompts: int = 8  # of a batch
    samples: int = 2  # responses to each
    estimators: tuple[str, ...] = ()  # none: all that critics, task and samples allow
    max_new_tokens: int | None = None  # None: the last stage's

    @property
    def block(self) -> int:
        """Batches of a block."""
        return -(-self.batches // BLOCKS)

    @property
    def blocks(self) -> int:
        return -(-self.batches // self.block)


def audit_gradients(
    recipe: Recipe, world: World, stop: StopFlag, options: GradientOptions, folder: Path
) -> None:
    """Sample the reference and the batches, or go on with them; write and show the figures. Collective.

    Raises InputError where options, recipe and critics do not fit together, before anything is sampled;
    StopRequested where it was asked to stop.
    """
    recipe = _with_roles(recipe, options)
    check_options(options, recipe)
    with session(recipe, world, stop, "gradients", folder) as run:
        run.actor.need_gradients()
        if SCALAR in run.roles:
            _load_scalar(run, str(options.scalar))
        estimators = run.together(lambda: choose(options.estimators, sources(run, options)))
        run.publish("actor", "critic")
        Audit(run, options, estimators).work()


def _with_roles(recipe: Recipe, options: GradientOptions) -> Recipe:
    """The actor, and the critics that an estimator asks. Raises InputError for a name that is none."""
    own, asked = recipe.roles.get("critic"), from_first(lambda: sources_of(options.estimators))
    roles: dict[str, str | None] = {"actor": options.checkpoint}
    there = options.critic is not None or (own is not None and (own.model.hf or own.model.checkpoint))
    if there and "generative" in asked:
        roles["critic"] = options.critic
    if options.scalar is not None and "scalar" in asked:
        roles[SCALAR] = None  # its weights are saved as `critic`
    return with_roles(recipe, roles)


def check_options(options: GradientOptions, recipe: Recipe) -> None:
    """Raise InputError for sizes that give no figures, for a role of the wrong kind, and for judging of which
    a critic's values would not be its own or a batch's. On every rank."""
    what = way_out = ""
    if options.chunks < 2 or options.reference % options.chunks or options.reference < 2 * options.chunks:
        what = f"--reference {options.reference} cannot be cut into --chunks {options.chunks}"
        way_out = "two chunks or more, equal ones, of two rollouts or more, which are each other's baseline"
    elif options.batches < 2:
        what, way_out = f"--batches {options.batches}", "two batches at least: the spread of one is not known"
    elif options.prompts * options.samples < 2:
        what, way_out = "a batch of one rollout", "raise --prompts or --samples: batches are whitened"
    if what:
        raise on_all_ranks(InputError(what, where="genac evaluate gradients", way_out=way_out))
    for name, head in (("critic", "lm"), (SCALAR, "value")):
        if name in recipe.roles and recipe.roles[name].model.head != head:
            raise on_all_ranks(
                InputError(
                    f"the role '{name}' is to have model.head: {head} here",
                    where=f"roles.{name}.model.head",
                    way_out=f"a generative critic is the role `critic`, a scalar one the role `{SCALAR}`",
                )
            )
    if "critic" in recipe.roles:
        _check_judging(recipe)


def _check_judging(recipe: Recipe) -> None:
    """Raise InputError where genac-* would be of other values than a critic's of one batch. On every rank."""
    if recipe.judging.teacher is not None:
        raise on_all_ranks(
            InputError(
                "judging.teacher puts the exact teacher in the critic's place: genac-* would be its values",
                where="judging.teacher",
                way_out="set judging.teacher=null; or name --estimators without genac-*: exact-* are its",
            )
        )
    if recipe.judging.budget is not None:
        raise on_all_ranks(
            InputError(
                "judging.budget deals the critic's tokens over a batch, and here many are played at once",
                where="judging.budget",
                way_out="set judging.budget=null, and lower judging.states.max_states for a cheaper critic; "
                "or name --estimators without genac-*",
            )
        )
    if recipe.judging.certain != "judged":
        raise on_all_ranks(
            InputError(
                "judging.certain leaves responses out whose group ended alike, and here every one is judged: "
                "genac-* would be other estimates than training has",
                where="judging.certain",
                way_out="set judging.certain=judged, or name --estimators without genac-*",
            )
        )


def rollout_of(recipe: Recipe, options: GradientOptions) -> RolloutConfig:
    """How the actor is sampled: as training does, the recipe's last stage."""
    config = recipe.stages[-1].rollout
    if options.max_new_tokens is None:
        return config
    return config.model_copy(update={"max_new_tokens": options.max_new_tokens})


def _load_scalar(run: Run, source: str) -> None:
    """A scalar critic's weights, which its run saved as `critic`. Collective."""
    path = from_first(lambda: find_checkpoint(Path(source)))
    saved = from_first(lambda: read_manifest(path)["roles"].get("critic") or {})
    if not saved.get("value"):
        what = "its critic is no scalar one" if saved else "it holds no critic"
        way_out = "give --scalar a run of a stage `value`, or of a `policy` with a scalar critic"
        raise on_all_ranks(InputError(what, where=str(path), way_out=way_out))
    load_checkpoint(path, {"critic": run.roles[SCALAR]})
    if run.tokenizers["actor"].get_vocab() != run.tokenizers[SCALAR].get_vocab():
        what = "the scalar critic has another tokenizer than the actor, whose token ids it must read"
        way_out = "name a scalar critic whose run had this actor's tokenizer"
        raise on_all_ranks(InputError(what, where=f"roles.{SCALAR}.model.tokenizer", way_out=way_out))


def sources(run: Run, options: GradientOptions) -> list[Source]:
    """What estimators can be made of here."""
    found: list[Source] = ["outcomes"]
    found += ["groups"] if options.samples > 1 else []
    found += ["scalar"] if SCALAR in run.roles else []
    found += ["generative"] if "critic" in run.roles else []
    return found + (["exact"] if run.task.teacher is not None else [])


class Audit:
    """One rank's part. Rank 0 keeps the rows; every rank keeps its part of each gradient."""

    def __init__(self, run: Run, options: GradientOptions, estimators: Sequence[Estimator]) -> None:
        self.run, self.options, self.estimators = run, options, estimators
        self.config = rollout_of(run.recipe, options)
        self.limit, self.seed = self.config.max_new_tokens, (run.recipe.seed, "gradients")
        self.parts = Parts(options.out, ROWS, ("kind", "number"))
        self.reference: Floats = np.zeros((0, 0))
        self.keys: list[Key] = [(REFERENCE, i) for i in range(options.chunks)]
        self.keys += [(BATCHES, i) for i in range(options.blocks)]
        self.judged = any(one.source == "generative" for one in estimators)

    def plan(self) -> dict[str, Any]:
        """What the figures depend on. Collective."""
        run, options, recipe = self.run, self.options, self.run.recipe
        return {
            "format": FORMAT,
            "kind": "gradients",
            "seed": recipe.seed,
            "roles": {name: identity(run, name) for name in run.roles},
            "task": recipe.task.model_dump(mode="json"),
            **own_code(recipe),
            **self._prompts(),
            "rollout": self.config.model_dump(mode="json", exclude={"prompts", "samples"}),
            "judging": self._judging(),
            "states": recipe.judging.states.model_dump(mode="json"),
            "reference": options.reference,
            "chunks": options.chunks,
            "batches": options.batches,
            "prompts": options.prompts,
            "samples": options.samples,
            "estimators": [one.name for one in self.estimators],
            "ranks": run.actor.layout.dp,
            # Which weights' gradients a rank keeps.
            "parts": run.actor.config.training.model_dump(include={*PARTED}),
        }

    def _judging(self) -> dict[str, Any] | None:
        if not self.judged:
            return None
        judging = self.run.recipe.judging
        digest = self.run.together(lambda: template_digest(judging))
        return {
            **judging.model_dump(mode="json", exclude={"teacher", "budget", "certain"}),
            "template": digest,
        }

    def _prompts(self) -> dict[str, str]:
        """What is asked: a file may be another under its old name, a chat template may print the date."""
        options, run = self.options, self.run
        drawn = train_prompts(run, 0, options.reference + options.batches * options.prompts)
        asked = run.together(lambda: list(drawn))
        found = {"texts": texts_digest(asked)}
        if prints_date(run.tokenizers["actor"]):
            found["rendered"] = rendered_digest([prompt.ids for prompt in asked])
        return found

    def work(self) -> None:
        """Every piece that is not there yet, then the figures. Collective."""
        run, plan = self.run, self.plan()
        known = set(from_first(lambda: sorted(self.parts.begin(plan))))
        if not from_first(lambda: self.parts.complete):
            lost = set().union(*gathered({key for key in known if not self._file(key).exists()}))
            known -= lost
            if any(key not in known for key in self.keys if key[0] == REFERENCE):
                known = {key for key in known if key[0] == REFERENCE}  # theirs are products with all of it
            run.together(self._need_room)
            self._tell_repeats()
            self._pieces(REFERENCE, "reference", known)
            p_bar = from_first(lambda: self._success(plan))
            momentum, step = run.recipe.judging.icc_momentum, from_first(lambda: told_step(run.recipe))
            run.icc = IccState(p_bar, step, momentum, run.recipe.seed)
            self.reference = self._vectors([(REFERENCE, i) for i in range(self.options.chunks)])
            self._pieces(BATCHES, "estimators", known)
            products = self._inner_products()
            run.together(lambda: self._finish(plan, products, p_bar) if run.world.rank == 0 else None)
            shutil.rmtree(self.options.out / VECTORS, ignore_errors=True)
        run.together(lambda: print(write_report(self.options.out)) if run.world.rank == 0 else None)

    def _tell_repeats(self) -> None:
        asked = self.options.reference + self.options.batches * self.options.prompts
        if asked > (there := self.run.task.train_size):
            self.run.progress.note(f"{asked} prompts of {there}: some are asked again, with other seeds")

    # --- pieces ----------------------------------------------------------------------------------

    def _pieces(self, kind: int, name: str, known: set[Key]) -> None:
        """What is left of one kind, with progress."""
        keys = [key for key in self.keys if key[0] == kind]
        left = [key for key in keys if key not in known]
        done = len(keys) - len(left)
        if left:
            self.run.progress.stage(name, len(keys), done)
        for key in left:
            row, vectors = (self._chunk if kind == REFERENCE else self._block)(key[1])
            self.run.together(partial(self._keep, key, row, vectors))
            done += 1
            self.run.progress.step(done, {"rollout/outcome_mean": mean(row["outcomes"])})
            stop_if_asked(self.run, f"{done} of {len(keys)} pieces of the {name}")

    def _keep(self, key: Key, row: Row, vectors: Floats) -> None:
        """The gradients first: a row without them would not be taken up again."""
        path = self._file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            np.save(file, vectors.astype(np.float32))
        part.replace(path)
        if self.run.world.rank == 0:
            self.parts.append([{"kind": key[0], "number": key[1], **row}], 0)

    def _chunk(self, number: int) -> tuple[Row, Floats]:
        """One chunk of the reference: its row, and this rank's part of its gradient [1, n]."""
        size = self.options.reference // self.options.chunks
        config = self.config.model_copy(update={"prompts": size, "samples": 1})
        prompts = train_prompts(self.run, number * size, size)
        batch = self._played(prompts, config, "reference", number, judged=False)
        vector = self._gradient(reference_samples(batch, self.limit), RAW)
        lengths = [len(rollout.completion.ids) for rollout in batch.rollouts]
        return {"outcomes": batch.outcomes, "length": mean(lengths)}, vector[None]

    def _block(self, number: int) -> tuple[Row, Floats]:
        """Some batches: their row, and this rank's part of each estimator's summed gradient [E, n]."""
        options = self.options
        first = number * options.block
        count = min(options.block, options.batches - first)
        config = self.config.model_copy(update={"prompts": options.prompts, "samples": options.samples})
        at = options.reference + first * options.prompts
        prompts = train_prompts(self.run, at, count * options.prompts)
        whole = self._played(prompts, config, "batches", number, judged=self.judged)
        batches = self._cut(self._asked(whole), count)
        sums = np.zeros((len(self.estimators), self.reference.shape[1]))
        inner = np.zeros((count, len(self.estimators), options.chunks + 1))  # with the chunks, and itself
        with self.run.phase("gradients"):
            for place, played in enumerate(batches):
                for which, one in enumerate(self.estimators):
                    vector = self._gradient(one.make(played, self.limit), one.loss)
                    sums[which] += vector
                    inner[place, which] = [*(self.reference @ vector), vector @ vector]
        inner = np.sum(gathered(inner), axis=0)
        row = {
            "outcomes": whole.outcomes,
            "batches": count,
            "inner": {one.name: inner[:, which].tolist() for which, one in enumerate(self.estimators)},
        }
        return row, sums

    def _played(
        self, prompts: Asked, config: RolloutConfig, what: str, number: int, *, judged: bool
    ) -> Batch:
        """A batch on every rank: gradients of many small parts of it are compared."""
        played = play(self.run, prompts, config, (*self.seed, what, number), judged=judged)
        return gathered_batch(self.run, played)

    def _asked(self, whole: Batch) -> Played:
        """The batches with the values of all their states by every critic that an estimator asks."""
        assert self.run.icc is not None
        exact = values = None
        if self.run.task.teacher is not None and any(one.source == "exact" for one in self.estimators):
            exact = self.run.together(partial(exact_batch, self.run, whole, self.run.icc.p_bar))
        if any(one.source == "scalar" for one in self.estimators):
            found = self.run.roles[SCALAR].values([_sequence(rollout) for rollout in whole.rollouts])
            values = [torch.tensor(row) for row in found]
        return Played(whole, whole if self.judged else None, exact, values)

    def _cut(self, whole: Played, count: int) -> list[Played]:
        """Batches of consecutive prompts."""
        prompts, size = self.options.prompts, self.options.prompts * self.options.samples

        def part(batch: Batch | None, place: int) -> Batch | None:
            if batch is None:
                return None
            return Batch(batch.groups[place * prompts : (place + 1) * prompts], batch.fresh)

        cut = []
        for place in range(count):
            outcomes = part(whole.outcomes, place)
            assert outcomes is not None
            values = None if whole.scalar is None else whole.scalar[place * size : (place + 1) * size]
            cut.append(Played(outcomes, part(whole.generative, place), part(whole.exact, place), values))
        return cut

    def _gradient(self, samples: list[Sample], loss: Any) -> Floats:
        """This rank's part, in double precision: inner products are of the fp32 gradients as they are."""
        part = self.run.actor.gradient(samples, make_ppo_loss(loss), temperature=self.config.temperature)
        return np.asarray(part.cpu().numpy(), dtype=np.float64)

    # --- the end ---------------------------------------------------------------------------------

    def _success(self, plan: dict[str, Any]) -> float:
        rows = self.parts.begin(plan)
        chunks = [rows[REFERENCE, i]["outcomes"] for i in range(self.options.chunks)]
        return mean(outcome for outcomes in chunks for outcome in outcomes)

    def _inner_products(self) -> dict[str, Any]:
        """Between the reference's chunks, and per estimator between blocks, summed over ranks. Collective."""
        keys = [key for key in self.keys if key[0] == BATCHES]
        found = [self.reference @ self.reference.T]
        for which in range(len(self.estimators)):
            each = [np.load(self._file(key), mmap_mode="r")[which] for key in keys]
            blocks = np.stack(each).astype(np.float64)
            found.append(blocks @ blocks.T)
        summed = [np.sum(parts, axis=0).tolist() for parts in zip(*gathered(found), strict=True)]
        names = [one.name for one in self.estimators]
        return {"chunks": summed[0], "blocks": dict(zip(names, summed[1:], strict=True))}

    def _finish(self, plan: dict[str, Any], products: dict[str, Any], p_bar: float) -> None:
        rows = self.parts.whole(plan, self.keys)
        recipe = self.run.recipe
        manifest = {
            "format": FORMAT,
            "kind": "gradients",
            "plan": plan,
            "success_rate": p_bar,
            "unbiased": [one.name for one in self.estimators if one.unbiased],
            "products": products,
            "made_from": {
                **{name: made_from(recipe, name) for name in recipe.roles},
                SCALAR: self.options.scalar,
                "version": __version__,
            },
        }
        self.parts.finish(rows, manifest)

    def _vectors(self, keys: Sequence[Key]) -> Floats:
        return np.concatenate([np.load(self._file(key)) for key in keys]).astype(np.float64)

    def _file(self, key: Key) -> Path:
        return self.options.out / VECTORS / f"{key[0]}-{key[1]:04d}-{self.run.world.rank:05d}.npy"

    def _need_room(self) -> None:
        """Raise InputError where memory or disk would not hold the gradients."""
        actor, options, names = self.run.actor, self.options, len(self.estimators)
        share = 8 * parameters(actor.shape) / actor.layout.dp if actor.active else 0.0
        memory = share * (options.chunks + names + options.blocks)
        disk = share / 2 * (options.chunks + names * options.blocks)
        out = next(path for path in (options.out, *options.out.resolve().parents) if path.exists())
        rooms = (("memory", memory, psutil.virtual_memory().available, ""),
                 ("disk", disk, shutil.disk_usage(out).free, f" at {out}"))  # fmt: skip
        for what, need, there, place in rooms:
            if need > 0.8 * there:
                raise InputError(
                    f"gradients of {parameters(actor.shape):,} weights take {need / 2**30:.1f} GiB of {what} "
                    f"on this rank, and {there / 2**30:.1f} GiB are free{place}",
                    where="genac evaluate gradients",
                    way_out="name fewer --estimators, lower --chunks, or take a smaller actor or more ranks",
                )


def _sequence(rollout: Rollout) -> Sample:
    prompt, ids = rollout.prompt.ids, rollout.completion.ids
    return Sample([*prompt, *ids], len(prompt))
