"""`genac traces ask`: states of one actor or several, their Monte-Carlo values, a teacher's answers.

OUT/
    states/ values/ answers/   rows as they come, by evaluation/parts.py: a killed command goes on
    traces.jsonl               what is learnt, by the recipe's settings; `genac traces filter` makes others
    judged.jsonl               every state that was asked about, for a value head (stages/distil.py)

It goes in rounds, until the answers that Monte Carlo bears out are as many as the stage's `size`, and even
over values: what is asked about (and paid for) is chosen by values that are known before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from genac_megatron.critic.balance import LEAST_RATE, MOST_AT_ONCE, MOST_OF_ONE, VALUE_BUCKETS
from genac_megatron.critic.icc import IccState
from genac_megatron.critic.judged import judged_rows
from genac_megatron.critic.trace_rows import as_state, plain, state_row
from genac_megatron.critic.verdicts import Row, accepted, bucket, evenly, monte_carlo
from genac_megatron.errors import InputError, on_all_ranks
from genac_megatron.evaluation.ask import (
    Asked,
    Kept,
    Spent,
    ask_critic_about,
    ask_endpoint_about,
    ask_exact_about,
)
from genac_megatron.evaluation.session import answered_by, own_code, stop_if_asked, with_roles
from genac_megatron.observe.manifest import MANIFEST, find_checkpoint
from genac_megatron.observe.runinfo import write_text_atomic
from genac_megatron.recipe.schema import Recipe, SftStage
from genac_megatron.recipe.stages import ActorConfig
from genac_megatron.records import State
from genac_megatron.stages.batch import generator_for
from genac_megatron.stages.rollouts import continue_states
from genac_megatron.stages.runtime import Run
from genac_megatron.stages.session import session
from genac_megatron.stages.sft_data import Drawn
from genac_megatron.stages.sft_orders import Order, orders
from genac_megatron.stages.stopping import StopFlag
from genac_megatron.stages.strengths import Cast
from genac_megatron.tracing.asked_stage import traces_stage
from genac_megatron.tracing.filter import (
    ANSWERS,
    STATES,
    TRACES,
    VALUES,
    FilterOptions,
    filtered,
    joined,
    parts_of,
)
from genac_megatron.training.agreement import from_first
from genac_megatron.training.layout import World

FORMAT = 1
JUDGED = "judged.jsonl"
ROUND = 1_000_000  # numbers of states of a round
SHOWN_S = 5.0  # between lines


@dataclass(frozen=True)
class AskOptions:
    """What is asked."""

    out: Path
    stage: str | None = None  # None: the first SFT of the critic on traces
    checkpoint: str | None = None  # the actor's; None: the recipe's
    critic: str | None = None  # the critic's, where it teaches itself
    chunk: int = 32  # states of a rank whose values are kept at once
    gate: str = "stop"


def ask_teacher(recipe: Recipe, world: World, stop: StopFlag, options: AskOptions, folder: Path) -> None:
    """Everything that is not there yet, then the traces. Collective. Raises InputError, PeerLost where the
    teacher did not answer, StopRequested where it was asked to stop, GateFailed where it cannot teach.
    """
    stage = traces_stage(recipe, options.stage)
    roles: dict[str, str | None] = {"actor": options.checkpoint}
    if stage.teacher.kind == "self":
        roles["critic"] = options.critic
    recipe = with_roles(recipe, roles)
    with session(recipe, world, stop, "traces", folder, trains=True) as run:
        run.publish(*(name for name in roles if name != "actor"))
        Collector(run, stage, options, stop).collect()


class Collector:
    """One rank's part of it."""

    def __init__(self, run: Run, stage: SftStage, options: AskOptions, stop: StopFlag) -> None:
        self.run, self.stage, self.options, self.stop = run, stage, options, stop
        self.parts = parts_of(options.out)
        self.order: Order = next(orders(run, stage))
        self.actors = stage.actors or [ActorConfig(name=run.recipe.judging.actor_name)]
        self.cast = Cast(run, stage, self.actors)
        self.spent = Spent(stage.teacher)
        self.rows: dict[str, list[Row]] = {}

    def plan(self) -> Row:
        """What the work is. The address, price and pace of a teacher are not: these may change."""
        recipe, stage = self.run.recipe, self.stage
        passing = {"url", "price", "timeout_s", "concurrency", "attempts", "api_key_env", "rounds", "path"}
        return {
            "format": FORMAT,
            "seed": recipe.seed,
            "task": recipe.task.model_dump(mode="json"),
            "judging": recipe.judging.model_dump(mode="json"),
            "rollout": stage.rollout.model_dump(mode="json"),
            "teacher": stage.teacher.model_dump(mode="json", exclude=passing),
            "length_buckets": stage.length_buckets,
            "actors": [self._named(one) for one in self.actors],
            "model": recipe.roles["actor"].model.model_dump(mode="json"),
            **answered_by(recipe),
            **own_code(recipe),
        }

    def _named(self, actor: ActorConfig) -> Row:
        """An actor by what its checkpoint's manifest says, as files may be moved."""
        found: Row = {"name": actor.name}
        if actor.checkpoint is not None:
            path = find_checkpoint(Path(actor.checkpoint)) / MANIFEST
            found["manifest"] = path.read_text(encoding="utf-8")
        return found

    def collect(self) -> None:
        """Rounds, then the traces."""
        size, rounds = self.stage.made, self.stage.teacher.rounds
        self._look()
        for answer in self.rows[ANSWERS]:
            self.spent.add(answer)
        if self.spent.count:
            self.run.progress.note(f"{self.options.out}: {self.spent.count} answers are there already")
        wanted = size
        for number in range(rounds):
            self._states(number, wanted)
            self._ask(number, self._chosen(number, wanted))
            before = ROUND * (number + 1)
            pairs = accepted(self._known(before), self.rows[ANSWERS], self.stage.teacher)
            if _enough(pairs, size):
                break
            asked = len({row["state"] for row in self.rows[ANSWERS] if row["state"] < before})
            missing = size - len(pairs) if len(pairs) < size else size
            wanted = min(
                math.ceil(missing / max(len(pairs) / max(asked, 1), LEAST_RATE)), MOST_AT_ONCE * size
            )
        self.run.together(lambda: self._finish() if self.run.world.rank == 0 else None)

    def _look(self) -> None:
        """The rows that are there, on every rank alike."""
        plan = self.run.together(self.plan)

        def read() -> dict[str, list[Row]]:
            self.options.out.mkdir(parents=True, exist_ok=True)
            return {
                name: sorted(
                    parts.begin(plan).values(), key=lambda row: (row["state"], row.get("judgement", 0))
                )
                for name, parts in self.parts.items()
            }

        self.rows = from_first(read)

    def _known(self, before: int = ROUND**2) -> list[Row]:
        """States with values, those of the rounds before a number."""
        return [row for row in joined(self.rows[STATES], self.rows[VALUES]) if row["state"] < before]

    # --- states and their values ----------------------------------------------------------------------

    def _states(self, number: int, wanted: int) -> None:
        """A round's states, of each actor as many, and the outcomes of their continuations."""
        each = math.ceil(wanted / len(self.actors))
        valued = {row["state"] for row in self.rows[VALUES]}
        for place, actor in enumerate(self.actors):
            first = ROUND * number + place * (ROUND // len(self.actors))
            mine = self._of(first)
            if mine and all(row["state"] in valued for row in mine):
                continue
            with self.cast.playing(actor) as told:
                if not mine:
                    self._draw(number, actor, told, first, each)
                    mine = self._of(first)
                self._continue([row for row in mine if row["state"] not in valued], actor, number)
        self._look()

    def _of(self, first: int) -> list[Row]:
        """The states of a round and an actor, where they are there whole."""
        last = first + ROUND // len(self.actors)
        found = [row for row in self.rows[STATES] if first <= row["state"] < last]
        return found if found and len(found) == found[0]["of"] else []

    def _draw(self, number: int, actor: ActorConfig, told: IccState, first: int, wanted: int) -> None:
        run = self.run
        before = [row["drawn"] for row in self.rows[STATES] if row["round"] < number]
        drawn = Drawn(run, self._order_of(actor, number))
        drawn.prompts = max(before, default=0)
        states = drawn.next(wanted)
        if not states:
            what = f"no state of {actor.name} could be drawn"
            way_out = "raise rollout.max_new_tokens or rollout.prompts, or lower judging.states.min_segment"
            raise on_all_ranks(InputError(what, where=f"stage {self.stage.name}", way_out=way_out))
        tokenizer, limit = run.tokenizers["actor"], self.stage.rollout.max_new_tokens
        most = run.recipe.judging.transcript_tokens
        counts = {"round": number, "of": len(states), "drawn": drawn.prompts}

        def rows() -> list[Row]:
            return [
                {
                    "state": first + place,
                    **counts,
                    **state_row(one, tokenizer, most, actor.name, told, limit),
                }
                for place, one in enumerate(states)
            ]

        run.together(lambda: self.parts[STATES].append(rows(), 0) if run.world.rank == 0 else None)
        self._look()

    def _order_of(self, actor: ActorConfig, number: int) -> Order:
        return replace(self.order, seed=(*self.order.seed, "traces", actor.name, number))

    def _continue(self, rows: Sequence[Row], actor: ActorConfig, number: int) -> None:
        """Fresh continuations of each state, kept by chunks."""
        run, count = self.run, self.stage.teacher.continuations
        seed = (*self._order_of(actor, number).seed, "monte carlo")
        generator = generator_for(run, self.stage.rollout, seed, judged=False)
        size = self.options.chunk * run.world.size
        run.progress.stage(f"values of {actor.name}, round {number + 1}", len(rows), 0)
        for at in range(0, len(rows), size):
            mine = run.share(rows[at : at + size])
            states = run.together(lambda mine=mine: [self._state(row) for row in mine])  # type: ignore[misc]
            with run.phase("continue"):
                found = run.generating(partial(continue_states, generator, states, count))
            kept = [{"state": r["state"], "outcomes": o} for r, o in zip(mine, found, strict=True)]
            run.together(partial(self.parts[VALUES].append, kept, run.world.rank))
            done = min(at + size, len(rows))
            run.progress.step(done, {})
            stop_if_asked(run, f"{done} of {len(rows)} values")

    def _state(self, row: Row) -> State:
        split, index = row["prompt_id"].rsplit("/", 1)
        return as_state(row, self.run.task.prompt(split, int(index)))

    # --- answers --------------------------------------------------------------------------------------

    def _chosen(self, number: int, wanted: int) -> list[Row]:
        """The states of all rounds so far that this round asks about: a function of what was there before."""
        end = ROUND * (number + 1)
        answered = {row["state"] for row in self.rows[ANSWERS] if row.get("round", 0) < number}
        left = [row for row in self._known(end) if row["state"] not in answered]
        return evenly(left, lambda row: row, wanted, self.run.recipe.seed)

    def _ask(self, number: int, states: Sequence[Row]) -> None:
        run, teacher, judging = self.run, self.stage.teacher, self.run.recipe.judging
        there = {(row["state"], row["judgement"]) for row in self.rows[ANSWERS]}
        wanted = [(row, n) for row in states for n in range(teacher.judgements)]
        left = [one for one in wanted if (one[0]["state"], one[1]) not in there]
        run.progress.stage(f"answers, round {number + 1}", len(wanted), len(wanted) - len(left))
        mine = run.share(left)
        keep = self._keep(number, len(wanted), len(wanted) - len(left))
        seed = (*self.order.seed, "answers")
        if teacher.kind == "endpoint":
            pace = max(1, teacher.concurrency // run.world.size)
            run.together(
                lambda: ask_endpoint_about(mine, teacher, judging, pace, keep, lambda: self.stop.asked)
            )
        elif teacher.kind == "self":
            self._by_pieces(mine, left, lambda some: ask_critic_about(run, some, seed, keep))
        else:
            run.together(lambda: ask_exact_about(run.task, mine, seed, keep, judging))
        self._look()
        stop_if_asked(run, f"{len(self.rows[ANSWERS])} answers")

    def _by_pieces(
        self, mine: Sequence[Asked], left: Sequence[Asked], ask: Callable[[Sequence[Asked]], None]
    ) -> None:
        """An engine's requests, so many at a time that a stop is heard."""
        size = 8 * self.options.chunk
        for at in range(0, math.ceil(len(left) / self.run.world.size), size):
            with self.run.phase("judge"):
                self.run.generating(partial(ask, mine[at : at + size]))
            if self.run.stop_requested():
                return

    def _keep(self, number: int, total: int, done: int) -> Kept:
        run, began = self.run, time.monotonic()
        parts, rank = self.parts[ANSWERS], run.world.rank
        count, last = 0, began

        def append(row: Row) -> None:
            parts.append([{**row, "round": number}], rank)

        def tell() -> None:
            nonlocal count, last
            count += 1
            at = min(total, done + count * run.world.size)
            if rank == 0 and (time.monotonic() - last >= SHOWN_S or at == total):
                last = time.monotonic()
                run.progress.step(at, self.spent.figures())

        return Kept(append, self.spent, tell)

    # --- the end --------------------------------------------------------------------------------------

    def _finish(self) -> None:
        teacher, out = self.stage.teacher, self.options.out
        options = FilterOptions(
            out / TRACES,
            self.stage.made,
            teacher.tolerance_floor,
            teacher.tolerance_errors,
            seed=self.run.recipe.seed,
            gate=self.options.gate,  # type: ignore[arg-type]
        )
        states = joined(self.rows[STATES], self.rows[VALUES])
        write_text_atomic(out / JUDGED, plain(judged_rows(states, self.rows[ANSWERS])))
        kept, text = filtered(states, self.rows[ANSWERS], options)
        write_text_atomic(out / TRACES, plain(kept))
        cost = "" if self.spent.dollars is None else f", {self.spent.dollars:.2f} dollars"
        self.run.progress.note(
            f"{text}\n{out / TRACES}: {self.spent.read:,} tokens read, {self.spent.written:,} written{cost}"
        )


def _enough(pairs: Sequence[tuple[Row, Row]], size: int) -> bool:
    """Whether `size` traces are there, of which no fifth of the values has far more than its share."""
    limit = math.ceil(MOST_OF_ONE * size / VALUE_BUCKETS)
    counts = [0] * VALUE_BUCKETS
    for state, _ in pairs:
        counts[bucket(monte_carlo(state))] += 1
    return sum(min(count, limit) for count in counts) >= size
