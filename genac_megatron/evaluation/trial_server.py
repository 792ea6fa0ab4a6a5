"""`genac evaluate task --url`: named benchmarks by any chat server (evaluation/trial.py)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass

from genac_megatron.errors import GenacError, InputError, PeerLost, StopRequested
from genac_megatron.evaluation.trial import Item, Trial, TrialOptions, sample_row, write_summary
from genac_megatron.serving.chat import Answer, ChatEndpoint, Names, Refusal, Reply, Unanswered
from genac_megatron.serving.there import need_there
from genac_megatron.stages.seeds import seed_for
from genac_megatron.tasks.benchmarks import make_benchmark

NAMES = Names("genac evaluate task", "--url", "--model", "--api-key-env")
KEPT_TOGETHER = 16  # answers of a server that are written at a time, and lost where we are killed


@dataclass(frozen=True)
class ServerOptions:
    """A model behind an OpenAI-compatible endpoint."""

    url: str
    model: str
    api_key_env: str | None = None
    concurrency: int = 32
    timeout_s: float = 1800.0
    attempts: int = 4


def try_server(server: ServerOptions, options: TrialOptions) -> str:
    """Every benchmark by a model behind an endpoint, from this process; the table.

    Raises InputError where the endpoint refuses the model, the key or all requests, PeerLost where some
    failed for good; what was answered is kept, and the same call goes on.
    """
    if not server.model:
        raise InputError(f"which model of {server.url}?", where=NAMES.url, way_out="name it by --model")
    endpoint = ChatEndpoint(
        server.url,
        server.model,
        api_key_env=server.api_key_env,
        timeout_s=server.timeout_s,
        concurrency=server.concurrency,
        attempts=server.attempts,
        who="server",
        names=NAMES,
    )
    limit = options.max_new_tokens or 4096
    temperature = 1.0 if options.temperature is None else options.temperature
    sampling = {"max_new_tokens": limit, "temperature": temperature}
    # Not its address: a server that is started again may have another.
    model, source = {"model": server.model}, {"model": server.model, "url": server.url.rstrip("/")}
    try:
        for name in options.names:
            task = make_benchmark(name, options.paths.get(name), None)
            _ask(endpoint, Trial(options, name, task, model, sampling, source), limit, temperature)
    except KeyboardInterrupt:
        raise StopRequested("stopped as asked", way_out="the same command goes on from here") from None
    finally:
        endpoint.close()
    return write_summary(options.out)


def _ask(endpoint: ChatEndpoint, trial: Trial, limit: int, temperature: float) -> None:
    left = trial.begin()
    if left:
        need_there(endpoint.base, endpoint.who, NAMES.url)

    def one(item: Item) -> tuple[Item, Reply]:
        seed = seed_for(*trial.seed_of(item)) % 2**31
        messages = trial.prompts[item[0]].messages
        return item, endpoint.ask(messages, limit, temperature, seed=seed)

    replies = _Replies(trial)
    with ThreadPoolExecutor(endpoint.concurrency, thread_name_prefix="ask") as pool:
        futures = [pool.submit(one, item) for item in left]
        try:
            for future in as_completed(futures):
                replies.take(future)
            replies.keep()
        except BaseException:
            for future in futures:
                future.cancel()
            replies.forget_kept()
            replies.keep()
            replies.take_what_is_open(futures)
            raise
    replies.check(endpoint, len(left))
    trial.finish()


class _Replies:
    """What came of a benchmark's requests: answers are graded and kept, failures counted."""

    def __init__(self, trial: Trial) -> None:
        self.trial = trial
        self.taken: set[Future[tuple[Item, Reply]]] = set()
        self.answered: list[tuple[Item, Answer]] = []
        self.refused: list[tuple[Item, Refusal]] = []
        self.failed, self.cause = 0, ""  # of the last

    def take(self, future: Future[tuple[Item, Reply]]) -> None:
        """Count a reply in. Raises what the request has raised."""
        self.taken.add(future)
        item, reply = future.result()
        if isinstance(reply, Unanswered):
            self.failed, self.cause = self.failed + 1, reply.cause
        elif isinstance(reply, Refusal):
            self.refused.append((item, reply))
        else:
            self.answered.append((item, reply))
        if len(self.answered) >= KEPT_TOGETHER:
            self.keep()

    def take_what_is_open(self, futures: Sequence[Future[tuple[Item, Reply]]]) -> None:
        """Keep the answers to requests that cannot be taken back; the pool waits for them anyway."""
        try:
            for future in as_completed([f for f in futures if f not in self.taken and not f.cancelled()]):
                try:
                    self.take(future)
                except GenacError:
                    continue  # one of its kind is being raised
        finally:
            self.keep()

    def forget_kept(self) -> None:
        """Let go of answers that are on the disk: an interrupt may have come before they were forgotten."""
        known = {(row["index"], row["sample"]) for row in self.trial.parts.so_far()}
        self.answered = [(item, answer) for item, answer in self.answered if item not in known]

    def keep(self) -> None:
        """Grade and write what was answered."""
        answered = self.answered
        pairs = [(self.trial.prompts[item[0]], answer.text or "") for item, answer in answered]
        cut_off = {place for place, (_, answer) in enumerate(answered) if answer.finish == "length"}
        outcomes = self.trial.task.verify_many(pairs, cut_off)
        rows = [
            sample_row(item, outcome, answer.finish, answer.tokens, answer.text or "")
            for (item, answer), outcome in zip(answered, outcomes, strict=True)
        ]
        if rows:
            self.trial.parts.append(rows, 0)
        self.answered = []

    def check(self, endpoint: ChatEndpoint, asked: int) -> None:
        """Raise where not every request was answered."""
        if self.refused and len(self.refused) == asked:
            raise endpoint.refused_all(asked, self.refused[-1][1])
        told, way_out = [], "give the same command again"
        if self.failed:
            told.append(
                f"{self.failed} of {asked} requests failed, each {endpoint.attempts} times, the last: "
                f"{self.cause}"
            )
            way_out = f"see that the server is up, lower --concurrency, and {way_out}"
        if self.refused:
            problems = sorted({item[0] for item, _ in self.refused})
            told.append(
                f"{len(self.refused)} of {asked} requests were refused (problems {_listed(problems)}), "
                f"the last with {self.refused[-1][1]}"
            )
            way_out = f"have the server accept what it refused (a longer context?); {way_out}"
        if told:
            what = f"{'; '.join(told)}; the others are kept"
            raise PeerLost(what, where=endpoint.url, way_out=way_out)


def _listed(numbers: Sequence[int], most: int = 10) -> str:
    shown = ", ".join(map(str, numbers[:most]))
    return shown if len(numbers) <= most else f"{shown} and {len(numbers) - most} more"
