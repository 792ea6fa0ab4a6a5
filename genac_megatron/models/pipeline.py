"""Megatron's layout of pipeline stages for a role whose pipeline is no group of the whole world's."""

from __future__ import annotations

from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout


class StageLayout(PipelineParallelLayerLayout):
    """It knows this rank's stage: Megatron's own asks its global state, which is of no role, for the stage
    and for whether that has several chunks.
    """

    def __init__(self, text: str, pp: int, stage: int) -> None:
        super().__init__(text, pp)
        self.stage = stage

    def get_num_layers_to_build(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """Layers of chunk vp_stage of stage pp_rank, or of this rank's."""
        return int(self.layout[self.stage if pp_rank is None else pp_rank][vp_stage or 0].count(layer_type))

    def get_layer_offset(
        self,
        layer_type: LayerType = LayerType.decoder,
        vp_stage: int | None = None,
        pp_rank: int | None = None,
    ) -> int:
        """Layers before those of chunk vp_stage of stage pp_rank, or of this rank's."""
        stage, chunk = self.stage if pp_rank is None else pp_rank, vp_stage or 0
        before = [
            (c, s) for c in range(chunk + 1) for s in range(len(self.layout)) if (c, s) < (chunk, stage)
        ]
        return sum(self.layout[s][c].count(layer_type) for c, s in before)
