"""A layout's numbers: its block of ranks and its parallel sizes. Its process groups: training/layout.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Self

from genac_megatron.errors import InputError
from genac_megatron.recipe import pipeline
from genac_megatron.recipe.schema import LayoutConfig


class Coords(NamedTuple):
    """A rank's coordinates in its layout."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Sizes:
    """A role's block of ranks [first_rank, first_rank + count) and its parallel sizes in it."""

    name: str
    first_rank: int
    count: int
    tp: int = 1
    pp: int = 1
    vpp: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    pipeline_model_parallel_layout: str | None = None  # which layers each stage has; None: as many in each

    def __post_init__(self) -> None:
        where = f"layout of {self.name}"
        block = self.tp * self.pp * self.cp
        if self.count % block:
            raise InputError(
                f"{self.count} ranks cannot be divided by tp {self.tp} x pp {self.pp} x cp {self.cp}",
                where=where,
                way_out=f"give it a multiple of {block} ranks",
            )
        if (self.tp * self.cp * self.dp) % self.ep:
            ranks = self.count // self.pp
            way_out = f"choose ep that divides {ranks}"
            raise InputError(f"ep {self.ep} does not divide its {ranks} ranks", where=where, way_out=way_out)
        if self.vpp > 1 and self.pp == 1:
            raise InputError("vpp needs pp > 1", where=where, way_out="set vpp: 1, or pp to at least 2")
        if self.sequence_parallel and self.tp == 1:
            raise InputError("sequence_parallel needs tp > 1", where=where, way_out="leave it out")

    @classmethod
    def from_config(cls, name: str, config: LayoutConfig, world: int) -> Self:
        """The layout of role `name` in a world of `world` ranks. Raises InputError where it does not fit."""
        count = world - config.first_rank if config.count is None else config.count
        if count < 1 or config.first_rank + count > world:
            raise InputError(
                f"ranks {config.first_rank} to {config.first_rank + count - 1} of a world of {world}",
                where=f"layout of {name}",
                way_out="set world.ranks, first_rank and count so that the block lies in the world",
            )
        parallel = config.tp > 1 if config.sequence_parallel is None else config.sequence_parallel
        sizes = config.model_dump(include={"first_rank", "tp", "pp", "vpp", "cp", "ep", pipeline.KEY})
        return cls(name=name, count=count, sequence_parallel=parallel, **sizes)

    @property
    def dp(self) -> int:
        """Data-parallel size."""
        return self.count // (self.tp * self.pp * self.cp)

    @property
    def ranks(self) -> range:
        """Global ranks of the block."""
        return range(self.first_rank, self.first_rank + self.count)

    @property
    def leaders(self) -> list[int]:
        """Global ranks with tp = cp = pp = 0, in order of dp."""
        return [self.rank_of(Coords(0, 0, d, 0)) for d in range(self.dp)]

    @property
    def output_rank(self) -> int:
        """Global rank that holds outputs: the first of the last stage."""
        return self.rank_of(Coords(0, 0, 0, self.pp - 1))

    def contains(self, rank: int) -> bool:
        """Whether global rank `rank` is in the block."""
        return rank in self.ranks

    def deals_as(self, other: Sizes) -> bool:
        """Whether every rank has the same coordinates in both, so that samples lie alike."""
        sizes = ("first_rank", "count", "tp", "cp", "pp")
        return all(getattr(self, name) == getattr(other, name) for name in sizes)

    def coords(self, rank: int) -> Coords:
        """Coordinates of global rank `rank`; raises ValueError outside the block."""
        if not self.contains(rank):
            raise ValueError(f"rank {rank} is not in the layout of {self.name} ({self.ranks})")
        rest = rank - self.first_rank
        rest, tp = divmod(rest, self.tp)
        rest, cp = divmod(rest, self.cp)
        pp, dp = divmod(rest, self.dp)
        return Coords(tp, cp, dp, pp)

    def rank_of(self, at: Coords) -> int:
        """Global rank at coordinates `at`."""
        return self.first_rank + at.tp + self.tp * (at.cp + self.cp * (at.dp + self.dp * at.pp))

    def chunk_layers(self, layers: int, pp: int, chunk: int) -> range:
        """Global indices of the layers in model chunk `chunk` (0..vpp-1) of pipeline stage `pp`."""
        chunks = pipeline.chunk_layers(layers, self.pp, self.vpp, self.pipeline_model_parallel_layout)
        return chunks[chunk * self.pp + pp]
