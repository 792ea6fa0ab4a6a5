"""Step time and memory of the cluster recipes on 8 to 1,024 H100s: on paper, nothing here has run on a GPU.

A recipe keeps its tensor, pipeline and expert parallelism; more GPUs are more data parallelism. The batch
grows with them (--batch grows: `prompts` per GPU stay the recipe's) or stays (--batch fixed). Servers are
where the recipe puts them, on the first node (--serving first-node), or on more nodes as they get more
(--serving scaled: `engine.nodes`). What a step of joint PPO takes, in seconds:

  train    per role: F / (G peak mfu) / (1 - bubble) (1 + waste), F = T (6 P + 12 L q s/2) (4/3 where all is
           recomputed); P weights that a token meets (no embedding, top-k experts), L layers, q = heads x
           head_dim, s mean sequence, T tokens, G GPUs that train the role.
           bubble = (pp - 1) / (m vpp + pp - 1), m micro-batches of a data-parallel rank. waste: measured.
  optimizer gradients (fp32) reduce-scattered, weights (bf16) all-gathered over dp ranks, not overlapped:
           6 w (dp - 1)/dp / bandwidth + 2 log2(dp) latency, w weights of a rank; NVLink where the group lies
           in one node, else the fabric.
  experts  there and back of k h tokens 2 bytes, L layers, in every pass, over ep ranks.
  rollout  max over roles of R l / b t(b) on a server with R requests of mean length l, b of them at a time,
           as many as its cache holds, engine.max_batch and max_batch_tokens allow (2,048 where none says):
           t(b) = max((W(b) + b c) / (tp hbm), 2 P b / (tp peak mfu)) + overhead; W(b) bytes of the weights
           that b tokens meet, c bytes of one request's KV cache. Plus prefill, 2 P per unique prompt token
           (nested states share theirs: measured ratio). Actor and critic overlap.
  tail     the longest response and its judgement with nobody else left: (most_r + most_c) t(1), as far as it
           is more than `rollout`.
  batch    a rank's own N sampled tokens are made into samples, packed, sent and read, N own_s, and it learns
           a few numbers of all n samples, from which it plans, n known_s; measured on a CPU (scale_batch.py).
           A rank's Python does it while its GPU waits.
  publish  bytes of the roles' weights / min(NVLink, fabric) / fraction of a plain copy's speed (measured).
  skew     everybody waits for the slowest of n ranks: sigma sqrt(2 ln n) of `train`.

REINFORCE trains the critic alone; SFT neither rolls out nor moves a batch. A pipeline is its last stage. The
loss from the fewest GPUs to the most is 1 - (tokens per GPU and second there) / (here); its cause is the part
that grew most per trained token. Memory is the most that a rank's GPU holds in any phase (recipe/memory.py),
which also says what KV cache a server has; recipes that do not fit are left out.

Assumed (class Assumed): mfu 0.40 with tensor parallelism's own traffic in it, FP8 1.25 times that, 80 % of
NVLink's, 70 % of the fabric's and 75 % of HBM's bandwidth, lengths half of their limit, 256 prompt tokens.
Run: python -m benchmarks.scale_model [RECIPE ...] [--batch fixed] [--serving first-node]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.machine import RESULTS, save, table
from benchmarks.published_models import write_place
from genac_megatron.cluster.placement import fit_faults, heaviest, server_shares
from genac_megatron.models.families.base import Shape
from genac_megatron.models.sizes import adapter_parameters, parameters, stage_parameters
from genac_megatron.recipe.estimate import expert_parameters
from genac_megatron.recipe.loader import load_recipe
from genac_megatron.recipe.rules import ranks_of, read_shape
from genac_megatron.recipe.schema import PpoStage, Recipe, RoleConfig, SftStage

RECIPES = Path(__file__).resolve().parents[1] / "recipes" / "cluster"
COUNTS = (8, 16, 32, 64, 128, 256, 512, 1024)
NODE = 8  # GPUs that NVLink joins
BF16, FP32 = 2, 4


@dataclass(frozen=True)
class Assumed:
    """An H100 SXM and its fabric. Bandwidths in bytes per second and GPU, one way, as they are reached."""

    peak: float = 989e12  # BF16 FLOP/s, dense
    mfu: float = 0.40
    fp8: float = 1.25  # times the BF16 speed
    hbm: float = 0.75 * 3.35e12
    nvlink: float = 0.80 * 450e9
    fabric: float = 0.70 * 50e9
    latency: float = 20e-6  # of a collective's hop
    step_overhead: float = 2e-3  # of a decoding step: launches, sampling, tensor-parallel latency
    fill: float = 0.5  # mean length over its limit
    prompt: float = 256.0  # tokens
    running: float = 2048.0  # requests that a server decodes together, where the recipe does not say
    skew: float = 0.02  # sigma of a rank's step, of its mean


@dataclass(frozen=True)
class Measured:
    """Pieces from benchmarks/results; see the scripts of that name."""

    known_s: float  # per sample of all ranks
    own_s: float  # per token sampled on a rank
    waste: float  # of packed micro-batches, with pipelines
    unique: float  # prompt tokens computed over unique ones
    copy: float  # of a plain copy's speed that publication to servers reaches

    @staticmethod
    def read(folder: Path = RESULTS) -> Measured:
        def rows(name: str) -> list[dict[str, Any]]:
            found: list[dict[str, Any]] = json.loads((folder / f"{name}.json").read_text())["rows"]
            return found

        costs = [_batch_costs(pair) for pair in _by_response(rows("scale_batch"))]
        known_s, own_s = (max(figures) for figures in zip(*costs, strict=True))
        copies = [row["alone/copy"] for row in rows("publication") if row["transport"].startswith("tensor")]
        # python -m benchmarks.packing and .critic_cost: as the README states them
        return Measured(known_s, own_s, 0.058, 1.0, min(copies))


def _by_response(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Of scale_batch's simulated rows, those of each length of responses, in order of GPUs."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in sorted((row for row in rows if row["way"] == "simulated"), key=lambda row: row["GPUs"]):
        found.setdefault(row["response"], []).append(row)
    return list(found.values())


def _batch_costs(rows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Seconds per sample of all ranks and per own token, by the fewest and the most GPUs: a rank's own part
    is the same in both.
    """
    few, many = rows[0], rows[-1]
    known_s = (many["stays_s"] - few["stays_s"]) / (many["samples"] - few["samples"])
    own_s = (few["stays_s"] - known_s * few["samples"]) / (few["tokens"] / few["GPUs"])
    return known_s, own_s


@dataclass
class Work:
    """Tokens of one step."""

    responses: float = 0.0
    response: float = 0.0  # mean tokens
    judged: float = 0.0  # states
    judgement: float = 0.0  # mean tokens
    trained: dict[str, tuple[float, float]] = field(default_factory=dict)  # role: tokens, mean sequence
    longest: float = 0.0  # tokens of the longest response, and of its last judgement
    longest_judgement: float = 0.0
    samples: float = 0.0  # that a rank knows of: responses and trained states

    @property
    def sampled(self) -> float:
        """Tokens of responses and judgements."""
        return self.responses * self.response + self.judged * self.judgement

    @property
    def tokens(self) -> float:
        """What a step is for: tokens trained."""
        return sum(tokens for tokens, _ in self.trained.values())


# --- pieces --------------------------------------------------------------------------------------


def active_parameters(shape: Shape) -> float:
    """Weights that a token meets: no embedding, of the experts those that it goes to."""
    count = parameters(shape) - (0 if shape.tie else shape.vocab * shape.hidden)
    experts = expert_parameters(shape, shape.layers, 1)
    return count - experts + experts * (shape.experts_per_token or 0) / (shape.experts or 1)


def train_flops(shape: Shape, tokens: float, sequence: float, recompute: str) -> float:
    """FLOPs of forward and backward over `tokens` in causal sequences of mean length `sequence`."""
    forward = 2 * active_parameters(shape) + 4 * shape.layers * shape.q_size * sequence / 2
    return tokens * forward * (4 if recompute == "full" else 3)


def bubble(pp: int, vpp: int, microbatches: float) -> float:
    """Share of a pipeline's time in which a stage waits."""
    return (pp - 1) / (max(microbatches, 1.0) * vpp + pp - 1)


def reduce_s(weights: float, dp: int, bandwidth: float, latency: float) -> float:
    """fp32 gradients reduce-scattered, bf16 weights all-gathered, over dp ranks of `weights` each."""
    if dp == 1:
        return 0.0
    return (FP32 + BF16) * weights * (dp - 1) / dp / bandwidth + 2 * math.log2(dp) * latency


def decode_s(shape: Shape, tp: int, together: float, length: float, assumed: Assumed) -> float:
    """One decoding step of `together` requests with `length` tokens in their caches."""
    experts = BF16 * expert_parameters(shape, shape.layers, 1)
    weights = BF16 * (parameters(shape) - (0 if shape.tie else shape.vocab * shape.hidden)) - experts
    if shape.experts:
        met = 1 - (1 - (shape.experts_per_token or 0) / shape.experts) ** together
        weights += experts * met
    cache = together * length * 2 * shape.layers * shape.kv_size * BF16
    read = (weights + cache) / (tp * assumed.hbm)
    compute = 2 * active_parameters(shape) * together / (tp * assumed.peak * assumed.mfu)
    return max(read, compute) + assumed.step_overhead


def serve_s(
    shape: Shape,
    role: RoleConfig,
    cache: float,
    servers: float,
    requests: float,
    new: float,
    read: float,
    assumed: Assumed,
) -> float:
    """Seconds in which `servers` answer `requests` of `new` tokens each after `read` prompt tokens in all.

    cache: tokens that a server's KV cache holds.
    """
    tp, share = role.engine.tp, requests / servers
    # What the server is started with (None: its own), and the most that SGLang decodes by itself.
    fits = min(cache / (assumed.prompt + new), role.engine.max_batch or assumed.running)
    together = max(1.0, min(share, fits))
    steps = max(1.0, share / together) * new
    prefill = 2 * active_parameters(shape) * read / (servers * tp * assumed.peak * assumed.mfu)
    return steps * decode_s(shape, tp, together, assumed.prompt + new, assumed) + prefill


def work_of(recipe: Recipe, grown: float, assumed: Assumed) -> Work:
    """A step of the recipe's last stage, with `grown` times its prompts."""
    stage = recipe.stages[-1]
    if isinstance(stage, SftStage):
        length = assumed.prompt + 1024 * assumed.fill
        return Work(trained={stage.role: (grown * stage.batch * length, length)})
    rollout, judging = stage.rollout, recipe.judging
    responses = grown * rollout.prompts * rollout.samples
    response, judgement = rollout.max_new_tokens * assumed.fill, judging.max_new_tokens * assumed.fill
    judged = grown * rollout.prompts + responses * (judging.states.max_states - 1)
    states = min(judged, responses * stage.train_share * stage.train_states)
    seen = assumed.prompt + response / 2 + judgement  # of a judgement: half of the response, on average
    trained = {"critic": (states * seen, seen)}
    if isinstance(stage, PpoStage):
        length = assumed.prompt + response
        passes = stage.epochs + (1 / 3 if stage.epochs * stage.minibatches > 1 else 0.0)  # the old log-probs
        trained["actor"] = (responses * length * passes, length)
        if not stage.train_critic:
            del trained["critic"]
    samples = states * ("critic" in trained) + responses * ("actor" in trained)
    longest = (float(rollout.max_new_tokens), float(judging.max_new_tokens))
    return Work(responses, response, judged, judgement, trained, *longest, samples)


# --- a step --------------------------------------------------------------------------------------


def train_parts(
    recipe: Recipe, shapes: Mapping[str, Shape], work: Work, assumed: Assumed, measured: Measured
) -> dict[str, float]:
    """Seconds of training, of the optimizer's and of the experts' traffic."""
    parts = {"train": 0.0, "optimizer": 0.0, "experts": 0.0}
    for name, (tokens, sequence) in work.trained.items():
        role, shape = recipe.roles[name], shapes[name]
        layout, training = role.layout, role.training
        gpus = ranks_of(layout, recipe.world.ranks)
        dp = gpus // (layout.tp * layout.pp * layout.cp)
        microbatches = math.ceil(tokens / dp / training.tokens_per_microbatch)
        # Fewer sequences than ranks: some wait with nothing to do.
        spread = max(1.0, microbatches * dp * min(sequence, training.tokens_per_microbatch) / tokens)
        speed = gpus * assumed.peak * assumed.mfu * (assumed.fp8 if training.fp8 != "off" else 1.0)
        waste = measured.waste if layout.pp > 1 else 0.0
        alone = train_flops(shape, tokens, sequence, training.recompute) / speed * spread * (1 + waste)
        parts["train"] += alone / (1 - bubble(layout.pp, layout.vpp, microbatches))
        weights = stage_parameters(shape, layout.tp, layout.pp, 0, layout.ep)
        inside = layout.tp * dp <= NODE
        band = assumed.nvlink if inside else assumed.fabric
        parts["optimizer"] += reduce_s(weights, dp, band, assumed.latency)
        if shape.experts and layout.ep > 1:
            sent = tokens / gpus * (shape.experts_per_token or 0) * shape.hidden * BF16 * (1 - 1 / layout.ep)
            passes = 2 * (3 if training.recompute == "full" else 2)  # there and back, each pass
            path = assumed.nvlink if layout.ep <= NODE else assumed.fabric  # its ranks follow one another
            parts["experts"] += passes * shape.layers * sent / path
    return parts


def rollout_parts(
    recipe: Recipe,
    shapes: Mapping[str, Shape],
    work: Work,
    servers: float,
    assumed: Assumed,
    measured: Measured,
) -> dict[str, float]:
    """Seconds of generation, with `servers` times the recipe's."""
    actor, critic = recipe.roles["actor"], recipe.roles["critic"]
    last_stage = recipe.stages[-1]
    samples = 1 if isinstance(last_stage, SftStage) else last_stage.rollout.samples
    read = {
        "actor": work.responses * assumed.prompt / samples,  # a group's samples share theirs
        "critic": work.responses * (assumed.prompt + work.response) * measured.unique,
    }
    asked = {"actor": (work.responses, work.response), "critic": (work.judged, work.judgement)}
    held = {name: share.cache / share.token for name, share in server_shares(recipe).items()}
    fleets = {name: recipe.roles[name].engine.share or name for name in ("actor", "critic")}
    acting, judging = (
        serve_s(
            shapes[name],
            role,
            held[fleets[name]],
            servers * role.engine.engines,
            *asked[name],
            read[name],
            assumed,
        )
        for name, role in (("actor", actor), ("critic", critic))
    )
    # One fleet does the work of both, and hides neither's behind the other's.
    both = acting + judging if fleets["actor"] == fleets["critic"] else max(acting, judging)
    last = work.longest * decode_s(shapes["actor"], actor.engine.tp, 1, work.longest, assumed)
    last += work.longest_judgement * decode_s(shapes["critic"], critic.engine.tp, 1, work.longest, assumed)
    return {"rollout": both, "tail": max(0.0, last - both)}


def published(role: RoleConfig, shape: Shape) -> int:
    """Numbers that go to servers: of adapters that these load, theirs alone."""
    adapter = role.training.adapter
    if adapter is None or not role.engine.enable_lora:
        return parameters(shape)
    return adapter_parameters(shape, adapter, 1, shape.layers)


def step_parts(
    recipe: Recipe, grown: float, servers: float, assumed: Assumed, measured: Measured
) -> tuple[dict[str, float], Work]:
    """Seconds of a step by part, and its work."""
    shapes = {name: read_shape(role.model) for name, role in recipe.roles.items()}
    work = work_of(recipe, grown, assumed)
    parts = train_parts(recipe, shapes, work, assumed, measured)
    if work.responses:
        parts |= rollout_parts(recipe, shapes, work, servers, assumed, measured)
        parts["batch"] = work.samples * measured.known_s + work.sampled / recipe.world.ranks * measured.own_s
        size = sum(BF16 * published(recipe.roles[name], shapes[name]) for name in work.trained)
        parts["publish"] = size / min(assumed.nvlink, assumed.fabric) / measured.copy
    parts["skew"] = parts["train"] * assumed.skew * math.sqrt(2 * math.log(recipe.world.ranks))
    return parts, work


# --- the table -----------------------------------------------------------------------------------


def resized(path: Path, gpus: int, serving: str) -> tuple[Recipe, float] | None:
    """The recipe on `gpus` GPUs, or on the most below that fit its layout, and how many times its servers.

    Where trainers share the first node with servers, `scaled` gives every node as many; where that node
    serves alone, one such node to as many GPUs as in the recipe. None where nothing fits.
    """
    named = load_recipe(path)
    first = min(role.layout.first_rank for role in named.roles.values())
    times = 1
    if serving == "scaled" and any(role.starts_servers for role in named.roles.values()):
        times = max(1, round(gpus / (named.world.ranks if first else NODE)))
    unit = math.lcm(*(_unit(role) for role in named.roles.values()))
    count = (gpus - first * times) // unit * unit
    if count < unit:
        return None
    given = [f"world.ranks={first + count}"]
    for name, role in named.roles.items():
        if role.layout.count is not None:
            given.append(f"roles.{name}.layout.count={count}")
    return load_recipe(path, given), float(times)


def _unit(role: RoleConfig) -> int:
    """The ranks by which a role's block may grow."""
    at = role.layout
    return at.pp * math.lcm(at.tp * at.cp, at.ep)


def rows_of(
    path: Path, batch: str, serving: str, assumed: Assumed, measured: Measured, counts: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """A row per number of GPUs on which the recipe fits; counts: (), COUNTS and its own."""
    named, rows = load_recipe(path), []
    for gpus in counts or sorted({*COUNTS, named.world.ranks}):
        fitted = resized(path, gpus, serving)
        if fitted is None:
            continue
        recipe, servers = fitted
        if fit_faults(recipe):
            continue  # too few ranks for the optimizer's states
        need = heaviest(recipe)[1]
        share = gpus / named.world.ranks
        parts, work = step_parts(recipe, share if batch == "grows" else 1.0, servers, assumed, measured)
        total = sum(parts.values())
        rows.append(
            {"gpus": gpus, "step_s": total, **parts, "tokens/s/gpu": work.tokens / total / gpus, "gib": need}
        )
    return rows


def loss(rows: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    """From the first row to the last: the share of speed per GPU that is lost, and what grew most."""
    first, last = rows[0], rows[-1]
    lost = 1 - last["tokens/s/gpu"] / first["tokens/s/gpu"]
    parts = [key for key in first if key not in ("gpus", "step_s", "tokens/s/gpu", "gib")]
    # Seconds of all GPUs for one trained token: so that a batch that grows and one that stays compare.
    spent = [{key: row[key] / row["step_s"] / row["tokens/s/gpu"] for key in parts} for row in (first, last)]
    return lost, max(parts, key=lambda key: spent[1][key] - spent[0][key])


@contextlib.contextmanager
def place() -> Any:
    """A folder to stand in with the config.json of every model that the recipes name."""
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        write_place(Path(folder))
        os.chdir(folder)
        try:
            yield Path(folder)
        finally:
            os.chdir(before)


def main() -> None:
    parser = argparse.ArgumentParser(description="Step time and memory of cluster recipes, on paper.")
    parser.add_argument("recipes", nargs="*", help="names in recipes/cluster (default: every one for ppo)")
    parser.add_argument("--batch", choices=("grows", "fixed"), default="grows")
    parser.add_argument("--serving", choices=("scaled", "first-node"), default="scaled")
    options = parser.parse_args()
    names = options.recipes or sorted(path.stem for path in RECIPES.glob("ppo-*.yaml"))
    assumed, measured, found = Assumed(), Measured.read(), []
    with place():
        for name in names:
            rows = rows_of(RECIPES / f"{name}.yaml", options.batch, options.serving, assumed, measured)
            lost, cause = loss(rows)
            print(f"\n{name}\n{table([{k: f'{v:.3g}' for k, v in row.items()} for row in rows])}")
            span = f"{rows[0]['gpus']} to {rows[-1]['gpus']} GPUs"
            print(f"{span}: {lost:.0%} of the speed per GPU is lost, most of it to {cause}")
            found.append({"recipe": name, "gpus": span, "lost": round(lost, 3), "cause": cause})
    print()
    print(table(found))
    print(save(f"scale_model-{options.batch}-{options.serving}", vars(assumed) | vars(measured), found))


if __name__ == "__main__":
    main()
