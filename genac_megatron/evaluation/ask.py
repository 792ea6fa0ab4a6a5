"""A teacher's answers about states, each kept, on the disk, before the next one is waited for."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from genac_megatron.critic.endpoint import EndpointTeacher
from genac_megatron.critic.score import format_answer, parse_score
from genac_megatron.critic.trace_rows import critic_prompt, messages, whole_partial
from genac_megatron.critic.verdicts import Row
from genac_megatron.errors import PeerLost
from genac_megatron.recipe.schema import JudgingConfig, TeacherConfig
from genac_megatron.records import Request, SamplingParams
from genac_megatron.serving.chat import Refusal, Reply, Unanswered
from genac_megatron.stages.seeds import seed_for
from genac_megatron.tasks.reasoning import opened_reasoning, usual, written

if TYPE_CHECKING:
    from genac_megatron.stages.runtime import Run
    from genac_megatron.tasks.base import Task

Asked = tuple[Row, int]  # a state, the number of the judgement of it
Keep = Callable[[Row], None]
MILLION = 1e6
FAILED_IN_A_ROW = 20  # requests without an answer, after which nobody is asked any more


def answer_row(asked: Asked, text: str, value: float | None, finish: str = "stop", **more: object) -> Row:
    """An answer as it is kept."""
    blank = {"reasoning": "", "read": 0, "tokens": 0, "refused": ""}
    state = {"state": asked[0]["state"], "judgement": asked[1]}
    return state | blank | {"text": text, "value": value, "finish": finish, **more}


class Spent:
    """What answers have cost so far; threads share it."""

    def __init__(self, teacher: TeacherConfig) -> None:
        self.price = teacher.price
        self.read = self.written = self.count = 0

    def add(self, row: Row) -> None:
        self.count += 1
        self.read += row["read"]
        self.written += row["tokens"]

    @property
    def dollars(self) -> float | None:
        if self.price is None:
            return None
        return (self.read * self.price[0] + self.written * self.price[1]) / MILLION

    def figures(self) -> dict[str, float]:
        """Of a step's line."""
        found = {"teacher/read": float(self.read), "teacher/written": float(self.written)}
        cost = {} if self.dollars is None else {"teacher/dollars": self.dollars}
        return cost | found


def ask_endpoint_about(
    mine: Sequence[Asked],
    teacher: TeacherConfig,
    judging: JudgingConfig,
    concurrency: int,
    keep: Keep,
    stopped: Callable[[], bool] = lambda: False,
    *,
    as_it_is: bool = False,
) -> None:
    """Ask an endpoint about each; `keep` has every answer before another request takes its place, and what
    was refused at the end, unless all was.

    as_it_is: it is a critic, and has the recipe's template, `brief` too.

    Raises InputError where the key, the model or all requests are refused, PeerLost where requests had no
    answer in the end: what was answered is kept.
    """
    endpoint = EndpointTeacher(teacher, judging.max_new_tokens, concurrency)
    replies = _Taken(keep)
    left = iter(mine)
    try:
        with ThreadPoolExecutor(concurrency, thread_name_prefix="teacher") as pool:
            open_: dict[Future[Reply], Asked] = {}
            try:
                while True:
                    while len(open_) < concurrency and not stopped() and not replies.hopeless:
                        if (asked := next(left, None)) is None:
                            break
                        open_[pool.submit(endpoint.ask, messages(asked[0], judging, as_it_is))] = asked
                    if not open_:
                        break
                    for future in wait(open_, return_when=FIRST_COMPLETED).done:
                        replies.take(open_.pop(future), future.result())
            except BaseException:
                # What is under way is paid for: it is waited for and kept.
                for future, asked in open_.items():
                    if not future.cancel() and future.exception() is None:
                        replies.take(asked, future.result())
                raise
        replies.check(endpoint, len(mine))
    finally:
        endpoint.close()


class _Taken:
    """What came of requests."""

    def __init__(self, keep: Keep) -> None:
        self.keep = keep
        self.refused: list[tuple[Asked, Refusal]] = []
        self.failed: list[Unanswered] = []
        self.answered = self.in_a_row = 0

    @property
    def hopeless(self) -> bool:
        return self.in_a_row >= FAILED_IN_A_ROW

    def take(self, asked: Asked, reply: Reply) -> None:
        if isinstance(reply, Unanswered):
            self.failed.append(reply)
            self.in_a_row += 1
            return
        self.in_a_row = 0
        if isinstance(reply, Refusal):
            self.refused.append((asked, reply))
            return
        self.answered += 1
        text = reply.text or ""
        more = {"reasoning": reply.reasoning, "read": reply.read, "tokens": reply.tokens}
        self.keep(answer_row(asked, text, parse_score(text), reply.finish, **more))

    def check(self, endpoint: EndpointTeacher, count: int) -> None:
        if self.refused and len(self.refused) == count > 1:  # none is kept: they are asked again
            raise endpoint.endpoint.refused_all(count, self.refused[-1][1])
        for asked, reply in self.refused:
            self.keep(answer_row(asked, "", None, refused=str(reply)))
        if self.failed:
            raise PeerLost(
                f"the teacher did not answer {len(self.failed)} of {count} requests, the last: "
                f"{self.failed[-1]}",
                where=endpoint.endpoint.url,
                way_out=f"the {self.answered} answers that came are kept: the same command goes on from "
                "there; raise teacher.timeout_s or lower teacher.concurrency",
            )


def ask_critic_about(run: Run, mine: Sequence[Asked], seed: tuple[object, ...], keep: Keep) -> None:
    """Ask the run's critic, by its engine; called inside `run.generating`."""
    judging, tokenizer = run.recipe.judging, run.tokenizers["critic"]
    tags = run.recipe.roles["critic"].model.reasoning_tags
    positions = run.critic.shape.max_positions
    params = SamplingParams(judging.max_new_tokens, judging.temperature, run.stop_ids("critic"))

    async def one(asked: Asked) -> None:
        row, number = asked
        ids = critic_prompt(row, tokenizer, judging)
        if len(ids) + judging.max_new_tokens > positions:
            keep(answer_row(asked, "", None, refused=f"no room: {len(ids)} tokens in {positions} positions"))
            return
        key = f"{row['state']}+{number}"
        done = await run.engines["critic"].complete(Request(ids, params, seed_for(*seed, key), key))
        text = written(tokenizer, done.ids, tags)
        value = parse_score(usual(text, tags), opened_reasoning(tokenizer, ids, tags))
        keep(answer_row(asked, text, value, done.finish, read=len(ids), tokens=len(done.ids)))

    async def every() -> None:
        await asyncio.gather(*(one(asked) for asked in mine))

    asyncio.run(every())


def ask_exact_about(
    task: Task, mine: Sequence[Asked], seed: tuple[object, ...], keep: Keep, judging: JudgingConfig
) -> None:
    """Ask the task's exact teacher, which knows what p_bar the row's actor has."""
    assert task.teacher is not None
    for asked in mine:
        row, number = asked
        split, index = row["prompt_id"].rsplit("/", 1)
        prompt = task.prompt(split, int(index))
        rng = random.Random(seed_for(*seed, row["state"], number))
        words, score = task.teacher.trace(prompt, whole_partial(row), row["p_bar"], rng)
        lines = [words.rstrip()]
        if score and judging.icc == "on":
            lines.append(f"p {row['p_bar']:.2f}")
        keep(answer_row(asked, "\n".join([*lines, format_answer(score)]), score / 10))


class Kept:
    """A rank's answers on their way to the disk, from any thread."""

    def __init__(self, append: Callable[[Row], None], spent: Spent, tell: Callable[[], None]) -> None:
        self._append, self.spent, self._tell = append, spent, tell
        self._lock = threading.Lock()

    def __call__(self, row: Row) -> None:
        with self._lock:
            self._append(row)
            self.spent.add(row)
            self._tell()
