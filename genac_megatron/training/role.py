"""Role: a language model with a job, trained by Megatron-core in a layout of its own.

All ranks of the world hold a `Role` object and call the same methods; the work happens on the role's
block of ranks and results are shared with everyone, so that stage code reads the same on every rank. What is
launched is shared when it is collected (training/launched.py): until then roles on other ranks work too.
Nothing here asks which role it serves.
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor

from genac_megatron import platform
from genac_megatron.errors import InputError, NotFinite, on_all_ranks
from genac_megatron.models.build import build_model
from genac_megatron.models.context_parallel import whole_of
from genac_megatron.models.families.base import Shape
from genac_megatron.observe.profile import mark
from genac_megatron.recipe.schema import OptimizerConfig, RoleConfig
from genac_megatron.records import Sample
from genac_megatron.training.distributed_batch import DistributedBatch, Scores, everywhere
from genac_megatron.training.exchange import gathered_rows
from genac_megatron.training.launched import NEED_FINITE, Launched, ScoredPass
from genac_megatron.training.layout import Layout
from genac_megatron.training.microbatches import (
    Planned,
    microbatches,
    packed_params,
    planned,
    shares_prefixes,
)
from genac_megatron.training.offload import forget_masters, forget_passes
from genac_megatron.training.optimizer import build_cooldown, build_optimizer, build_scheduler, reload_weights
from genac_megatron.training.overlap import begin_gather, ddp_config, end_gather, wait_for_the_head
from genac_megatron.training.packing import Pack, multiple_for, unpack
from genac_megatron.training.resting import Resting
from genac_megatron.training.trained import is_trained

Loss = Callable[[Tensor, Tensor | None, Mapping[str, Tensor]], tuple[Tensor, dict[str, Tensor]]]
Counted = Callable[[float], None]
Samples = Sequence[Sample] | DistributedBatch  # a list: the whole batch, the same on every rank


@dataclass
class StepResult:
    """What a training step did; its stats are the same on every rank of the world."""

    # The loss's weighted sums over the batch, plus grad_norm, lr, tokens, and computed_tokens: of shared
    # prefixes once
    stats: dict[str, float]
    # Per sample (of a distributed batch: made on this rank), of its trained tokens, before the update
    logprobs: list[list[float]]


class Role(Resting):
    """One trained model: its chunks on this rank, optimizer, schedule. Inactive outside its block."""

    def __init__(
        self,
        name: str,
        config: RoleConfig,
        shape: Shape,
        layout: Layout,
        groups: Any,
        *,
        beside: Role | None = None,
    ) -> None:
        """beside: the role whose base this one's adapters stand on, the very same parameters, in a layout
        that agrees (recipe/adapter_rules.py); None: it has a model of its own.
        """
        super().__init__(None if beside is None else beside.memory)
        self.name, self.config, self.shape, self.layout, self.groups = name, config, shape, layout, groups
        self.active = groups is not None
        self.chunks: list[Any] = []
        self.optimizer: Any = None
        self.scheduler: Any = None
        self.optimizer_config: OptimizerConfig = config.optimizer
        self.serial = 0
        self.owns_base = beside is None
        self.base = ""  # of an adapter: the digest of the model that it stands beside, once that is loaded
        self.base_and_head = ""  # the same with a scalar head, as version 0.1.0's checkpoints have it
        if self.active:
            base = None if beside is None else beside.models
            self._models = build_model(shape, layout, groups, config.training, config.model.init_seed, base)
            self.model_config = self._models[0].config
            self.chunks = [self._wrap(model, index) for index, model in enumerate(self._models)]
            self._connect()
            self._drop_gradients()
        self.multiple = multiple_for(
            tp=layout.tp if layout.sequence_parallel else 1,
            cp=layout.cp,
            fp8=config.training.fp8,
        )

    def _wrap(self, model: Any, index: int) -> Any:
        training = self.config.training
        if training.dtype == "bf16":
            from megatron.core.transformer.module import Float16Module

            model = Float16Module(self.model_config, model)
        for name, parameter in model.named_parameters():  # before DDP and the optimizer, which hold no other
            parameter.requires_grad_(is_trained(name, training, self.shape))
        if training.frozen:
            return model
        ddp = DistributedDataParallel(
            self.model_config,
            ddp_config(training),
            model,
            disable_bucketing=index > 0,
            pg_collection=self.groups,
        )
        wait_for_the_head(ddp)
        return ddp

    def _connect(self) -> None:
        """Give the schedule its hooks: gradient finalisation over this role's groups only."""
        groups, config, chunks = self.groups, self.model_config, self.chunks

        def finalize(model: Any, num_tokens: Any = None, **_: Any) -> None:
            finalize_model_grads(model, num_tokens, pg_collection=groups)

        config.finalize_model_grads_func = finalize
        config.grad_scale_func = None
        if self.config.training.overlap_grad_reduce and not self.config.training.frozen:
            one = len(chunks) == 1
            config.no_sync_func = chunks[0].no_sync if one else [c.no_sync for c in chunks]
        self.communicator = P2PCommunicator(groups.pp, config) if self.layout.pp > 1 else None

    @property
    def keeps_base(self) -> bool:
        """Whether its checkpoints hold its adapter's base too: one that moves is nowhere else."""
        adapter = self.config.training.adapter
        return (
            adapter is not None
            and self.owns_base
            and (adapter.merge_every is not None or self.memory.merges > 0)
        )

    # --- stages --------------------------------------------------------------------------------

    def begin_stage(self, optimizer: OptimizerConfig | None, total_steps: int) -> None:
        """A fresh optimizer and schedule over the current weights. Collective over the world."""
        self.settle()
        self._have_gradients()
        self.optimizer_config = optimizer or self.config.optimizer
        self.optimizer = build_optimizer(
            self.chunks, self.groups, self.optimizer_config, self.config.training
        )
        if self.active:
            self.scheduler = build_scheduler(self.optimizer, self.optimizer_config, total_steps)

    def cool_down(self, after: int, steps: int) -> None:
        """Let the learning rate fall linearly to min_lr over the next `steps`, from what it is after `after`
        steps of the stage's schedule. The schedule's own count of steps goes on.
        """
        if self.active:
            done, self.scheduler.num_steps = self.scheduler.num_steps, after
            lr = float(self.scheduler.get_lr(self.optimizer.param_groups[0]))
            self.scheduler = build_cooldown(self.optimizer, self.optimizer_config, lr, after, steps)
            self.scheduler.step(increment=done)

    def skip(self, steps: int) -> None:
        """Let the schedule go on by updates that a batch was too small for."""
        if self.active:
            self.scheduler.step(increment=steps)

    def end_stage(self) -> None:
        """Let the memory of optimizer and gradients go: the next stage's begin from the weights."""
        end_gather(self.chunks)
        self.optimizer = self.scheduler = None
        self._states.drop()
        if self.active:
            self.model_config.grad_scale_func = None  # the optimizer's own
            forget_masters(self._models)
            forget_passes(self._models)
            self._drop_gradients()
            gc.collect()  # where the optimizer is in a cycle
            platform.empty_cache()

    def refresh_master(self) -> None:
        """After the weights were written from outside: copy them to the fp32 master weights."""
        self.wake()
        self.serial += 1
        if self.optimizer is not None:
            reload_weights(self.optimizer)

    # --- passes --------------------------------------------------------------------------------

    def take(self, samples: Samples) -> DistributedBatch:
        """The batch on this role's block, for several passes over it: one exchange brings samples of a
        distributed batch to the ranks that compute them, unless they are there already.

        Collective over the world. Raises InputError, on every rank, for experts that the model has not.
        """
        batch = samples if isinstance(samples, DistributedBatch) else everywhere(samples)
        if batch.everywhere or (batch.block is not None and batch.block.deals_as(self.layout)):
            return batch
        if batch.block is not None:
            raise ValueError(f"{self.name} is given a batch that lies on the block of {batch.block.name}")
        batch.need_experts(self.shape)
        return batch.brought(self.layout, self.groups, self._planned(batch).owner)

    def launch_step(
        self,
        samples: Samples,
        loss: Loss,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> ScoredPass[StepResult]:
        """One optimizer step over `samples`. Collective over the block, or over the world where `take` is.

        The loss is a sum over tokens whose `weights` are normalised over the batch, so the step is the same
        in every layout. Its result raises NotFinite on every rank where its loss or gradient is.
        """
        self.serial += 1
        batch, stats, scores = self.take(samples), None, None
        if self.active:
            self.wake()
            for chunk in self.chunks:
                chunk.train()
                chunk.zero_grad_buffer()
            self.optimizer.zero_grad()
            with mark(f"{self.name} forward and backward"):
                outputs, packs = self._run(batch, loss, temperature, with_entropy, forward_only=False)
            with mark(f"{self.name} optimizer"):
                ok, grad_norm, _ = self.optimizer.step()
            begin_gather(self.chunks)
            lr = self.optimizer.param_groups[0]["lr"]
            self.scheduler.step(increment=1)
            stats, scores = self._collect(outputs, packs, batch)
            stats |= {"grad_norm": float(grad_norm or 0.0), "lr": float(lr), "updated": float(bool(ok))}
            stats["tokens"] = float(batch.lengths.sum())
        return ScoredPass(self.layout, self.groups, stats, self._finite, batch, scores)

    def train_step(
        self,
        samples: Samples,
        loss: Loss,
        *,
        temperature: float = 1.0,
        with_entropy: bool = False,
    ) -> StepResult:
        """`launch_step` and its result. Collective over the world."""
        return self.launch_step(samples, loss, temperature=temperature, with_entropy=with_entropy).result()

    def gradient(self, samples: Sequence[Sample], loss: Loss, *, temperature: float = 1.0) -> Tensor:
        """The loss's gradient over `samples` (the whole batch), without an update: this rank's part, flat.

        The parts of the block's ranks, end to end, are the whole gradient in fp32, with zeros between some
        of its tensors; their order is the layout's alone, so inner products of two gradients are sums over
        ranks of those of the parts. No optimizer is needed. Empty outside the block. Collective over the
        world. Raises InputError for a frozen role, and where weights are cut over ranks (tp, pp, cp, ep):
        parts would hold some of them twice; NotFinite, on every rank, where a value of the whole is not.
        """
        self.need_gradients()
        part, spoilt = torch.empty(0), 0
        if self.active:
            part = self._own_part(samples, loss, temperature)
            told = (~part.isfinite()).sum()
            dist.all_reduce(told, group=self.groups.intra_dist_opt)
            spoilt = int(told.item())
        Launched(self.layout, self.groups, spoilt if self.active else None, self._whole).result()
        return part

    def _whole(self, spoilt: int) -> None:
        if spoilt:
            raise on_all_ranks(NotFinite(f"{self.name}/gradient is not finite in {spoilt} places"))

    def _own_part(self, samples: Sequence[Sample], loss: Loss, temperature: float) -> Tensor:
        """This rank's part of the loss's gradient. Collective over the block."""
        self.wake()
        self._have_gradients()
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        with mark(f"{self.name} forward and backward"):
            self._run(everywhere(samples), loss, temperature, False, forward_only=False)
        rank, ranks = self.groups.dp.rank(), self.layout.dp
        buckets = [bucket.grad_data for buffer in self._buffers() for bucket in buffer.buckets]
        # Of a bucket that is scattered by rank, and of one that all ranks have whole, this share is summed.
        part = torch.cat([data.tensor_split(ranks)[rank].float() for data in buckets])
        if self.optimizer is None:
            self._drop_gradients()
        return part

    def need_gradients(self) -> None:
        """Raise InputError, on every rank alike, where `gradient` cannot read them."""
        sizes = {name: getattr(self.layout, name) for name in ("tp", "pp", "cp", "ep")}
        cut = " and ".join(f"{name} {size}" for name, size in sizes.items() if size > 1)
        if self.config.training.frozen:
            what, key = f"'{self.name}' is frozen: it has no gradients", "training.frozen"
        elif cut:
            what, key = f"gradients are read where each rank has all weights, not with {cut}", "layout"
        else:
            return
        way_out = f"leave {key} out: data-parallel ranks share the work"
        raise on_all_ranks(InputError(what, where=f"roles.{self.name}.{key}", way_out=way_out))

    def _finite(self, stats: dict[str, float], scores: Callable[[], list[list[float]]]) -> StepResult:
        for key in NEED_FINITE:
            if not math.isfinite(stats[key]):
                raise on_all_ranks(NotFinite(f"{self.name}/{key} is {stats[key]}"))
        return StepResult(stats, scores())

    @torch.no_grad()
    def launch_logprobs(
        self,
        samples: Samples,
        *,
        temperature: float = 1.0,
        base: bool = False,
        counted: Counted | None = None,
    ) -> ScoredPass[list[list[float]]]:
        """Per sample, the log-probs of its trained tokens under the current weights; of a distributed batch
        per sample that was made on this rank.

        base: under those that an adapter stands beside. counted: is told on one rank how many tokens all
        ranks together computed. Collective as `launch_step`.
        """
        batch, stats, scores = self.take(samples), None, None
        if self.active:
            self.wake()
            for chunk in self.chunks:
                chunk.eval()
            with mark(f"{self.name} forward"), self._without_adapters(base):
                outputs, packs = self._run(batch, _no_loss, temperature, False, forward_only=True)
            stats, scores = self._collect(outputs, packs, batch)
            if counted is not None and dist.get_rank() == self.layout.output_rank:
                counted(stats["computed_tokens"])
        return ScoredPass(self.layout, self.groups, stats, lambda _, found: found(), batch, scores)

    @contextmanager
    def _without_adapters(self, off: bool) -> Iterator[None]:
        adapters = [model.adapters for model in self._models if off]
        for each in adapters:
            each.switch(False)
        try:
            yield
        finally:
            for each in adapters:
                each.switch(True)

    def logprobs(self, samples: Samples, **how: Any) -> list[list[float]]:
        """`launch_logprobs` and its result. Collective over the world."""
        return self.launch_logprobs(samples, **how).result()

    def values(self, samples: Samples, **how: Any) -> list[list[float]]:
        """Per sample, a scalar critic's value of the prefix strictly before each of its trained tokens.

        how: as for `launch_logprobs`.
        """
        outputs = self.logprobs(samples, **how)
        if not self.shape.logit:
            return outputs
        return [torch.tensor(logits).sigmoid().tolist() for logits in outputs]

    def _planned(self, batch: DistributedBatch) -> Planned:
        """Who computes what. Collective over the world where the batch is not taken yet, else the block."""
        if self.name not in batch.plans:
            tell = dist.get_rank() == self.layout.first_rank
            cp, training, shape = self.layout.cp, self.config.training, self.shape
            batch.plans[self.name] = planned(
                batch,
                self.layout,
                self.groups,
                training=training,
                shape=shape,
                multiple=self.multiple,
                trees=shares_prefixes(self.name, training, shape, cp=cp, tell=tell),
            )
        return batch.plans[self.name]

    def _packs(self, batch: DistributedBatch) -> list[Pack]:
        """This data-parallel rank's micro-batches."""
        made, groups = self._planned(batch), self.groups
        return microbatches(
            batch.fetched(groups, made.owner),
            batch.known.names,
            made,
            self.layout,
            groups.dp.rank(),
            groups.cp.rank(),
            training=self.config.training,
            shape=self.shape,
        )

    def _run(
        self,
        batch: DistributedBatch,
        loss: Loss,
        temperature: float,
        with_entropy: bool,
        *,
        forward_only: bool,
    ) -> tuple[list[dict[str, Any]], list[Pack]]:
        packs = [pack.to(platform.device()) for pack in self._packs(batch)]
        scale = float(len(packs) * self.layout.dp)  # undoes the schedule's and DDP's means
        dropping = None if forward_only else self._dropping()

        def forward_step(packs_left: Iterator[Pack], model: Any) -> tuple[Tensor, Any]:
            pack = next(packs_left)
            output = model(
                pack.tokens_T[None],
                pack.positions_T[None],
                None,
                labels=pack.labels_T[None],
                loss_mask=pack.loss_mask_T[None],
                packed_seq_params=packed_params(pack, dropping),
            )
            return output, partial(_apply_loss, loss, pack, scale)

        for model in self._models:
            model.scoring.temperature, model.scoring.with_entropy = temperature, with_entropy
        iterators: Any = [iter(packs) for _ in self.chunks]
        arguments: dict[str, Any] = {
            "forward_step_func": forward_step,
            "data_iterator": iterators if self.layout.vpp > 1 else iterators[0],
            "model": self.chunks if self.layout.vpp > 1 else self.chunks[0],
            "num_microbatches": len(packs),
            "seq_length": packs[0].tokens_T.numel() * self.layout.cp,  # the schedule divides it again
            "micro_batch_size": 1,
            "decoder_seq_length": packs[0].tokens_T.numel() * self.layout.cp,
            "forward_only": forward_only,
            "pg_collection": self.groups,
        }
        if self.layout.pp == 1:
            schedule = schedules.forward_backward_no_pipelining
        elif self.layout.vpp == 1:
            schedule = schedules.forward_backward_pipelining_without_interleaving
        else:
            schedule = schedules.forward_backward_pipelining_with_interleaving
        if self.communicator is not None:
            arguments["p2p_communicator"] = self.communicator
        if not forward_only:
            scale_loss = self.optimizer.scale_loss if self.optimizer is not None else None
            self.model_config.grad_scale_func = scale_loss
        return schedule(**arguments), packs

    def _dropping(self) -> int | None:
        """The step whose dropout adapters have: the schedule's, which a resumed run has too."""
        adapter = self.config.training.adapter
        if adapter is None or not adapter.dropout:
            return None
        return 0 if self.scheduler is None else int(self.scheduler.num_steps)

    # --- results -------------------------------------------------------------------------------

    def _collect(
        self, outputs: list[dict[str, Any]], packs: list[Pack], batch: DistributedBatch
    ) -> tuple[dict[str, float], dict[int, Scores]]:
        """Sums of stats over data- and context-parallel ranks, on the last stage, and log-probs where samples
        are.
        """
        stats: dict[str, float] = {}
        mine: dict[int, Scores] = {}
        if self.layout.is_last_stage(self.groups):
            first = self.groups.cp.rank() == 0
            for output, pack in zip(outputs, packs, strict=True):
                stats["computed_tokens"] = stats.get("computed_tokens", 0.0) + pack.used * first
                for key, value in output["stats"].items():
                    stats[key] = stats.get(key, 0.0) + float(value)
                whole_T = whole_of(output["logp_T"], pack.share, int(pack.cu_seqlens[-1]), self.groups.cp)
                for index, values_T in unpack(pack, whole_T.float().cpu()).items():
                    mine[index] = values_T.numpy()
            sums = gathered_rows(np.array([list(stats.values())]), self.groups.dp_cp)
            stats = dict(zip(stats, (float(sum(x)) for x in np.concatenate(sums).T.tolist()), strict=True))
        return stats, batch.settled(mine, self._planned(batch).owner, self.layout, self.groups)


def _no_loss(
    logp_T: Tensor, entropy_T: Tensor | None, fields: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    return logp_T.sum() * 0.0, {}


def _apply_loss(loss: Loss, pack: Pack, scale: float, output: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """`output` is [1 or 2, T]: log-probs and, where asked for, entropies. Of a pack of trees [1 or 2, E]."""
    logp_T = output[0].float()
    entropy_T = output[1].float() if output.size(0) > 1 else None
    value, stats = loss(logp_T, entropy_T, pack.fields)
    detached = {key: figure.detach() for key, figure in stats.items()}
    detached["loss"] = value.detach()
    return value * scale, {"stats": detached, "logp_T": logp_T.detach()}
