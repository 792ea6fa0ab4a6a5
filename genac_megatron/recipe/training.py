"""How a role is trained, and how a run's steps are profiled: blocks of the recipe. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from genac_megatron.recipe.block import Block, Fraction, Positive, PositiveFloat


class OptimizerConfig(Block):
    """AdamW under Megatron's distributed optimizer."""

    lr: PositiveFloat = 1e-6  # the largest learning rate: after warm-up
    min_lr: Annotated[float, Field(ge=0)] = 0.0  # where linear and cosine end, behind the last update
    schedule: Literal["constant", "linear", "cosine"] = "constant"  # over the stage's updates
    warmup_steps: Annotated[int, Field(ge=0)] = 0  # updates in which lr rises from 0
    weight_decay: Annotated[float, Field(ge=0)] = 0.01  # decoupled, as in AdamW
    beta1: Fraction = 0.9  # of the mean of gradients
    beta2: Fraction = 0.95  # of the mean of their squares
    eps: PositiveFloat = 1e-8  # added to the denominator
    clip_grad: Annotated[float, Field(ge=0)] = 1.0  # largest gradient norm; 0: no clipping


Target = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS: list[Target] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class AdapterConfig(Block):
    """A role trained as low-rank adapters beside a frozen base (LoRA, arXiv 2106.09685), in PEFT's terms."""

    rank: Positive = 32  # of A and B
    alpha: PositiveFloat = 32.0  # what B A adds to a weight is multiplied by alpha / rank
    targets: Annotated[list[Target], Field(min_length=1)] = TARGETS  # projections that have an adapter
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0  # of an adapter's input, while it trains
    # Each so many steps of a stage that trains it: merge it into its base, which all roles on that base then
    # stand on, and begin it anew, without moments (ReLoRA, arXiv 2307.05695); null: the base stays as it is
    merge_every: Positive | None = None

    @property
    def scale(self) -> float:
        """Of B A."""
        return self.alpha / self.rank


class TrainingConfig(Block):
    """How a role trains: precision, recomputation, micro-batches."""

    dtype: Literal["fp32", "bf16"] = "bf16"  # of weights and activations; master weights are fp32
    fp8: Literal["off", "delayed", "tensorwise", "blockwise", "mxfp8"] = "off"  # one of Megatron's recipes
    fp8_param: bool = False  # weights are kept, and gathered over data-parallel ranks, in FP8
    fp8_amax_history: Positive = 1024  # delayed: past steps whose largest value sets a scale
    bf16_first_layers: Annotated[int, Field(ge=0)] = 0  # under fp8: layers at the beginning that stay in BF16
    bf16_last_layers: Annotated[int, Field(ge=0)] = 0  # ... and at the end
    tokens_per_microbatch: Positive = 8192  # a pack's length at most; memory goes by it
    share_prefixes: bool = True  # what samples of a micro-batch have in common at their beginning: once
    # What computes attention over them. auto: on a CPU torch's kernel there, else flex. flex: FlexAttention;
    # merged: flash attention's calls, merged by log-sum-exp (half precision); flat: nothing is shared
    tree_attention: Literal["auto", "flex", "merged", "flat"] = "auto"
    # Of pipelines: each micro-batch at its own length, which stages tell each other first; false: all are
    # padded to the longest
    variable_seq_lengths: bool = False
    # activations that are computed again in the backward pass, to save memory
    recompute: Literal["off", "selective", "full"] = "off"
    distributed_optimizer: bool = True  # optimizer states are dealt out over data-parallel ranks
    overlap_grad_reduce: bool = False  # gradients are reduced while the backward pass goes on
    # Updated weights are gathered from the distributed optimizer's ranks meanwhile, and each layer waits for
    # its own; publications, checkpoints and whatever else reads weights wait for all
    overlap_param_gather: bool = False
    # Matrix products and the exchanges of tensor parallelism at once, by Transformer Engine's user buffers;
    # every pack then has tokens_per_microbatch positions
    tp_comm_overlap: bool = False
    # Transformer Engine's Adam, whose moments have the two dtypes below
    use_precision_aware_optimizer: bool = False
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"  # of the mean of gradients
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"  # of the mean of their squares
    optimizer_cpu_offload: bool = False  # masters and moments stay in host memory, where they are updated
    optimizer_offload_fraction: Annotated[float, Field(gt=0, le=1)] = 1.0  # ... of so much of the weights
    overlap_cpu_optimizer_d2h_h2d: bool = False  # ... while gradients and weights are copied
    fuse_weight_gradients: bool = True  # add them up inside the matrix product, where Transformer Engine can
    logprob_chunk: Positive = 1024  # tokens whose logits exist at once
    offload: bool = False  # rest in host memory while engines generate: weights, gradients, optimizer states
    frozen: bool = False  # never trained nor served: the reference of kl_coef; no gradients, no optimizer
    frozen_attention: bool = False  # attention and the norm before it are never trained (SAO's critic)
    adapter: AdapterConfig | None = None  # train adapters alone, beside the role's model as it begins
    specs: Literal["auto", "torch", "te"] = "auto"  # layer specs: te where Transformer Engine is
    moe_aux_loss: Annotated[float, Field(ge=0)] = 0.0  # of experts: coefficient of the load-balancing loss
    moe_dispatcher: Literal["alltoall", "allgather"] = "alltoall"  # how tokens reach experts on other ranks

    @model_validator(mode="after")
    def _trees(self) -> Self:
        if not self.share_prefixes and self.tree_attention in ("flex", "merged"):
            raise ValueError(
                f"tree_attention: {self.tree_attention} is of shared prefixes, and share_prefixes is false"
            )
        return self


class ProfileConfig(Block):
    """Which steps torch's profiler watches, of every stage; into the run folder's profile/."""

    on: bool = False  # genac run --profile
    first: Positive = 2  # counted in each stage, from where the run began or resumed; the first one warms up
    steps: Positive = 1  # how many
    ranks: list[Annotated[int, Field(ge=0)]] = [0]  # that are watched
    memory: bool = False  # allocations too, and on a GPU a snapshot of them
    shapes: bool = False  # of operators' inputs
    stacks: bool = False  # Python's, of every operator: slow
