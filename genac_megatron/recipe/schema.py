"""The typed recipe: every key, its default, its meaning. Imports no torch; defaults live in this room only.

One recipe names the world, the roles, the task, and a list of stages. Unknown keys are errors.
"""

from __future__ import annotations

import os
import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ModelWrapValidatorHandler, model_validator

from genac_megatron.recipe.algorithms import AdvantageConfig as AdvantageConfig
from genac_megatron.recipe.algorithms import LossConfig as LossConfig
from genac_megatron.recipe.block import Block, Fraction, Positive, PositiveFloat
from genac_megatron.recipe.environments import EnvironmentConfig as EnvironmentConfig
from genac_megatron.recipe.judged import BestConfig as BestConfig
from genac_megatron.recipe.judged import CheckpointConfig as CheckpointConfig
from genac_megatron.recipe.judged import EvaluationConfig as EvaluationConfig
from genac_megatron.recipe.judged import SuiteConfig as SuiteConfig
from genac_megatron.recipe.over import merged
from genac_megatron.recipe.sharing import inherited, lent
from genac_megatron.recipe.stages import Band as Band
from genac_megatron.recipe.stages import CriticGate as CriticGate
from genac_megatron.recipe.stages import DistilConfig as DistilConfig
from genac_megatron.recipe.stages import EntryGate as EntryGate
from genac_megatron.recipe.stages import PolicyStage as PolicyStage
from genac_megatron.recipe.stages import PpoStage as PpoStage
from genac_megatron.recipe.stages import ReinforceGate as ReinforceGate
from genac_megatron.recipe.stages import ReinforceStage as ReinforceStage
from genac_megatron.recipe.stages import ReplayConfig as ReplayConfig
from genac_megatron.recipe.stages import RolloutConfig as RolloutConfig
from genac_megatron.recipe.stages import SftGate as SftGate
from genac_megatron.recipe.stages import SftHeldout as SftHeldout
from genac_megatron.recipe.stages import SftSource as SftSource
from genac_megatron.recipe.stages import SftStage as SftStage
from genac_megatron.recipe.stages import StageConfig as StageConfig
from genac_megatron.recipe.stages import TeacherConfig as TeacherConfig
from genac_megatron.recipe.stages import ValueStage as ValueStage
from genac_megatron.recipe.tasks import TaskConfig
from genac_megatron.recipe.training import AdapterConfig as AdapterConfig
from genac_megatron.recipe.training import OptimizerConfig as OptimizerConfig
from genac_megatron.recipe.training import ProfileConfig as ProfileConfig
from genac_megatron.recipe.training import TrainingConfig as TrainingConfig

# --- roles ---------------------------------------------------------------------------------------


class ModelShape(Block):
    """The sizes of a GPT-class model, in Hugging Face's terms; the last four are of a mixture of experts."""

    layers: Positive  # of the transformer
    hidden: Positive  # width of the residual stream
    ffn: Positive  # width of the MLP
    heads: Positive  # of attention's queries
    kv_heads: Positive  # of its keys and values; fewer than heads: grouped
    head_dim: Positive | None = None  # None: hidden / heads
    vocab: Positive | None = None  # None: the tokenizer's size
    tie_embeddings: bool = True  # one matrix for input and output tokens
    rope_theta: PositiveFloat = 10_000.0  # base of the rotary positions
    norm_eps: PositiveFloat = 1e-6  # of RMS norms
    max_positions: Positive = 4096  # the longest sequence
    init_std: PositiveFloat = 0.02  # of random weights
    experts: Positive | None = None  # a mixture of experts: how many per layer
    experts_per_token: Positive | None = None  # how many of them a token goes to
    expert_ffn: Positive | None = None  # width of an expert's MLP
    norm_topk: bool | None = None  # the chosen experts' weights are made to sum to 1


Tag = Annotated[str, Field(min_length=1, pattern=r"\S")]


class ModelConfig(Block):
    """Which model: a Hugging Face folder, or a family and a shape with random weights."""

    hf: str | None = None  # a local folder with config.json, safetensors, tokenizer
    family: str | None = None  # llama, qwen2, qwen3, ...: a row of models/registry.py
    shape: ModelShape | None = None
    tokenizer: str | None = None  # a folder, or builtin:tiny; None: the hf folder's
    # A Jinja file, or a template's text: in the place of the tokenizer's, or where it has none (base models)
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] = {}  # of its chat template, such as {enable_thinking: false}
    # What opens and closes its reasoning, where no known family writes so (docs/tasks.md has those that are
    # told from an answer by themselves)
    reasoning_tags: tuple[Tag, Tag] | None = None
    checkpoint: str | None = None  # start from this role's weights in a checkpoint, or a run's newest
    base: str | None = None  # of an adapter: stand beside this role's weights in one; None: hf's, or random
    base_role: str | None = None  # what the role is called in `base`; None: as it is here
    share: str | None = None  # of an adapter: stand on the base of this role, which keeps the only copy of it
    peft: str | None = None  # of an adapter: begin with the one in this folder of PEFT's
    # value: a scalar critic, trained on the actor's tokens, never served; logit: one that gives the value's
    # log-odds and is trained by cross-entropy
    head: Literal["lm", "value", "logit"] = "lm"
    init_seed: int = 0  # of random weights


class LayoutConfig(Block):
    """A role's block of ranks and its parallel sizes in it. dp = count / (tp * pp * cp)."""

    first_rank: Annotated[int, Field(ge=0)] = 0  # of the world
    count: Positive | None = None  # None: all ranks from first_rank on
    tp: Positive = 1  # tensor-parallel size
    pp: Positive = 1  # pipeline stages
    vpp: Positive = 1  # model chunks per pipeline stage
    # Which layers each stage has, such as Et*3|t*4|t*3L (recipe/pipeline.py); None: as many in each
    pipeline_model_parallel_layout: str | None = None
    cp: Positive = 1  # context-parallel size: a pack's tokens are dealt out
    ep: Positive = 1  # expert-parallel size
    sequence_parallel: bool | None = None  # None: on where tp > 1


class EngineConfig(Block):
    """What generates with the role's weights: a model in every rank, or SGLang's servers."""

    kind: Literal["embedded", "sglang"] = "embedded"  # a model in every rank, or SGLang's servers
    dtype: Literal["fp32", "bf16"] = "bf16"  # of activations, and of the weights that are not quantized
    quantization: Literal["off", "fp8"] = "off"  # of the served weights: fp8 in blocks (models/blockwise.py)
    # Requests decoded together, per engine, and their prompt + new tokens together: an SGLang server's KV
    # cache. None: 64 and 65,536; of a server on a GPU its own, as much as its memory holds.
    max_batch: Positive | None = None
    max_batch_tokens: Positive | None = None  # as said above
    routing_replay: bool = False  # of experts: the trainer sends tokens to those that this engine chose

    # What follows is for sglang. Servers are started here, unless `urls` names some.
    enable_lora: bool = False  # servers load the role's adapters beside its base; no: merged weights
    share: str | None = None  # generate on the servers of this role, which hold the adapters of both
    engines: Positive = 1  # servers
    nodes: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] = [0]  # as many servers on each
    tp: Positive = 1  # tensor-parallel ranks of each
    nnodes: Positive = 1  # a server spans so many of `nodes`, in their order, with tp / nnodes ranks on each
    # Of the job's on each node, counted in CUDA_VISIBLE_DEVICES, as many as a server has ranks there, in
    # order; none: the first that no other server has (recipe/servers.py)
    gpus: list[Annotated[int, Field(ge=0)]] = []
    # Of a GPU's whole memory, for weights and KV cache; None: what the others on it leave (recipe/memory.py)
    mem_fraction: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    host: str = (
        "127.0.0.1"  # the address they bind to; in a world of several nodes: each node's on the fabric
    )
    port: Annotated[int, Field(ge=1, le=65_535)] | None = None  # of the first server; None: free ones
    python: str | None = None  # the serving environment's interpreter; None: $GENAC_SERVE_PYTHON
    args: list[str] = []  # more of SGLang's command line
    urls: list[str] = []  # servers that somebody else runs
    api_key_env: str | None = None  # the variable that holds the key which `urls` ask for
    max_in_flight: Positive = 128  # requests at a time, per server and rank
    # Without a sign that a request's server works, its queue not counted; then it is tried elsewhere
    request_timeout_s: PositiveFloat = 900.0
    start_timeout_s: PositiveFloat = 600.0  # this and the one above: below world.timeout_s
    attempts: Positive = 3  # for one request
    restarts: Annotated[int, Field(ge=0)] = 3  # of lost servers, in a run
    release: Literal["off", "kv_cache", "all"] = "off"  # GPU memory given back while the trainer computes

    @property
    def engines_per_node(self) -> int:
        """Servers that have ranks on each of `nodes`."""
        return self.engines * self.nnodes // len(self.nodes)

    @property
    def tp_per_node(self) -> int:
        """Ranks of a server on each of its nodes."""
        return self.tp // self.nnodes

    def nodes_of(self, index: int) -> list[int]:
        """The nodes of server `index`: the first servers are on the first ones."""
        first = index // self.engines_per_node * self.nnodes
        return self.nodes[first : first + self.nnodes]

    def node_of(self, index: int) -> int:
        """The node at which server `index` is reached."""
        return self.nodes_of(index)[0]

    def gpus_of(self, index: int) -> list[int]:
        """Of `gpus`, those of server `index`, on each of its nodes."""
        first = index % self.engines_per_node * self.tp_per_node
        return self.gpus[first : first + self.tp_per_node]

    @property
    def batch(self) -> int:
        """`max_batch` of an embedded engine, or of a server on a CPU, which cannot tell."""
        return self.max_batch or 64

    @property
    def batch_tokens(self) -> int:
        """`max_batch_tokens`, likewise."""
        return self.max_batch_tokens or 65_536


class PublicationConfig(Block):
    """How new weights reach the role's engines. Limits are in seconds, below world.timeout_s."""

    every: Positive = 1  # steps; what is evaluated or ends a stage is published all the same
    transport: Literal["auto", "tensor", "group", "disk"] = "auto"  # to servers; auto: tensor, else group
    mode: Literal["drain", "in_flight"] = "drain"  # running requests: wait for them, or let them go on after
    pause: Literal["retract", "in_place"] = "retract"  # in_flight: recompute their KV cache, or keep the old
    bucket_mib: Positive | None = None  # None: 512, or the largest tensor where that is more
    verify: Literal["tensors", "version"] = "tensors"  # a run's first publication; later ones: version
    verify_every: Positive | None = 50  # and tensors again after so many publications; None: never
    folder: str | None = None  # disk: one that trainer and servers share
    address: str | None = None  # group: this machine's, as servers reach it; None: found by asking the kernel
    drain_s: PositiveFloat = 300.0  # for running requests to end
    control_s: PositiveFloat = 60.0  # for each of pause, flush, begin, end, version, resume
    send_s: PositiveFloat = 300.0  # for each bucket
    verify_s: PositiveFloat = 300.0  # for the checksums


class RoleConfig(Block):
    """A trained language model with a job."""

    model: ModelConfig
    layout: LayoutConfig = LayoutConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    training: TrainingConfig = TrainingConfig()
    engine: EngineConfig = EngineConfig()
    publication: PublicationConfig = PublicationConfig()

    @property
    def fp8(self) -> bool:
        """Whether its trainer or its engine has FP8's rounding."""
        return self.training.fp8 != "off" or self.engine.quantization == "fp8"

    def user_buffers(self, hidden: int) -> tuple[int, int, int, int]:
        """What Transformer Engine's user buffers (`tp_comm_overlap`) are made by: tp, cp, tokens, hidden."""
        return (self.layout.tp, self.layout.cp, self.training.tokens_per_microbatch, hidden)

    @property
    def served(self) -> bool:
        """Whether engines generate with it."""
        return self.model.head == "lm" and not self.training.frozen

    @property
    def starts_servers(self) -> bool:
        """Whether a run starts SGLang servers for it."""
        engine = self.engine
        return self.served and engine.kind == "sglang" and not engine.urls and engine.share is None


# --- the critic's game ---------------------------------------------------------------------------


class StatesConfig(Block):
    """Where a response is cut into segments (method §3)."""

    # at line ends, every fixed_length tokens, or where the actor was unsure; of a conversation before each
    # turn of the actor's too, and with turns there alone
    cutter: Literal["lines", "fixed", "low_prob", "turns"] = "lines"
    max_states: Positive = 8  # per response, the prompt state included
    min_segment: Positive = 8  # tokens
    fixed_length: Positive = 128  # tokens, of the cutter fixed
    low_prob: Fraction = 0.2  # the cutter low_prob: a segment ends with a token below it
    # The whole response, before its outcome is known, is judged too: the critic learns from it, with this
    # weight beside a segment's state (hamishivi/open-instruct: 4), and it is no segment's baseline.
    final: bool = False
    final_weight: PositiveFloat = 1.0  # of that judgement


class JudgingConfig(Block):
    """What the critic is shown and how its answer is read (method §2)."""

    # exact: the task's exact teacher is in the critic's place, to study what a perfect critic would give
    teacher: Literal["exact"] | None = None
    template: str = "standard"  # standard, brief, or a path to a template file
    privileged: bool = False  # the critic is shown the reference, or the rubric, which the actor never is
    actor_name: str = "actor"  # in the critic's prompt
    # in-context conditioning: the critic is told the actor's success rate, nothing, or one drawn at random
    icc: Literal["on", "off", "shuffled"] = "on"
    icc_momentum: Fraction = 0.9  # of the moving success rate
    # Of a conversation, what the critic is shown at most, in the actor's tokens: longer ones lose parts of
    # their middle, which is said there. None: all of it
    transcript_tokens: Positive | None = None
    temperature: PositiveFloat = 1.0  # of the critic's samples
    max_new_tokens: Positive = 1024  # of a judgement
    score: Literal["sampled", "soft"] = "sampled"  # soft: its expectation, at the same temperature
    # Critic tokens per batch, dealt over responses beforehand; states beyond them take the fallback value.
    budget: Positive | None = None
    # left_out: in joint stages no response is judged whose group's other responses all ended alike: what they
    # ended with is its baseline (stages/certain.py)
    certain: Literal["judged", "left_out"] = "judged"
    states: StatesConfig = StatesConfig()


# --- the run -------------------------------------------------------------------------------------


class WandbConfig(Block):
    """Weights & Biases."""

    mode: Literal["off", "offline", "online"] = "off"  # offline: kept in the run folder, for `wandb sync`
    project: str = "genac"  # of W&B
    entity: str | None = None  # of W&B; None: your default


class ObserveConfig(Block):
    """Where figures go, and when a run warns."""

    tensorboard: bool = True  # event files in the run folder
    wandb: WandbConfig = WandbConfig()
    shown_rollouts: Annotated[int, Field(ge=0)] = 4  # kept readable, of an evaluation or a step
    # steps from one of whose batch rollouts are kept to the next, from the first on; 0: of evaluations alone
    rollouts_every: Annotated[int, Field(ge=0)] = 10
    plots: bool = True  # in the report that a run writes at its end: some seconds
    parity_alarm: PositiveFloat = 0.5  # p99 |delta log-prob| above which a run warns
    parity_alarm_fp8: PositiveFloat = 1.0  # ... of a role that is trained or served in FP8
    profile: ProfileConfig = ProfileConfig()


class WorldConfig(Block):
    """The processes that a run is."""

    ranks: Annotated[int, Field(ge=1, le=1 << 16)] = 1  # processes that train, of all nodes
    threads: Positive = 1  # CPU threads per rank
    timeout_s: PositiveFloat = 1800.0  # of every collective


def _slurm_time(text: str) -> str:
    """One of the forms that sbatch's --time takes."""
    if not re.fullmatch(r"\d+|(\d+:)?\d+:\d{1,2}|\d+-\d{1,2}(:\d{1,2}){0,2}|UNLIMITED|INFINITE", text):
        raise ValueError("no time that Slurm knows: write hours:minutes:seconds, days-hours or minutes")
    return text


SlurmTime = Annotated[str, AfterValidator(_slurm_time)]


class ClusterConfig(Block):
    """Where the recipe is meant to run: `genac slurm` works nodes and tasks out from it."""

    gpu: str | None = None  # a row of cluster/gpus.py, such as h100-80g; None: ranks are CPU processes
    ranks_per_node: Positive = 8  # each has a GPU of its own where `gpu` is named
    cpus_per_rank: Positive = 8  # cores that Slurm is asked for
    time_limit: SlurmTime = "24:00:00"  # hours:minutes:seconds, or another of Slurm's forms


class Recipe(Block):
    """Everything a run needs. `genac run RECIPE --resolved` prints it whole."""

    name: str  # of the run, and of its folder
    runs: Annotated[str, AfterValidator(os.path.expanduser)] = "runs"  # the run folder is <runs>/<name>
    # of data, samples and random weights: the same seed and ranks give the same run
    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    world: WorldConfig = WorldConfig()
    cluster: ClusterConfig = ClusterConfig()
    roles: dict[str, RoleConfig]
    task: TaskConfig
    environment: EnvironmentConfig | None = None  # what answers the actor's turns; None: it has one
    judging: JudgingConfig = JudgingConfig()
    stages: Annotated[list[StageConfig], Field(min_length=1)]
    evaluation: EvaluationConfig = EvaluationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    observe: ObserveConfig = ObserveConfig()

    @model_validator(mode="wrap")
    @classmethod
    def _whole(cls, recipe: Any, read: ModelWrapValidatorHandler[Recipe]) -> Recipe:
        return merged(read(lent(inherited(recipe))))

    def parity_alarm(self, role: str) -> tuple[str, float]:
        """The key of `observe` that says where a role's parity alarms, and its value."""
        key = "parity_alarm_fp8" if self.roles[role].fp8 else "parity_alarm"
        return key, getattr(self.observe, key)
