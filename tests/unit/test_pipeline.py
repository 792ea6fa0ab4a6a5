"""Which layers are in which pipeline stage: Megatron's own layout says the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genac_megatron.errors import InputError
from genac_megatron.models.pipeline import LayerType, StageLayout
from genac_megatron.recipe.pipeline import chunk_layers, stage_layers
from genac_megatron.recipe.schema import LayoutConfig


@given(st.integers(1, 4), st.integers(1, 3), st.data())
def test_stages_have_what_megatron_gives_them(pp: int, vpp: int, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(1, 4), min_size=pp * vpp, max_size=pp * vpp))
    forms = data.draw(st.lists(st.booleans(), min_size=pp * vpp, max_size=pp * vpp))
    text = (
        "E" + "|".join(f"t*{n}" if short else "t" * n for n, short in zip(counts, forms, strict=True)) + "L"
    )
    ours = chunk_layers(sum(counts), pp, vpp, text)
    for stage in range(pp):
        theirs = StageLayout(text, pp, stage)
        for chunk in range(vpp):
            layers = theirs.get_layer_id_list(LayerType.decoder, vp_stage=chunk)
            assert list(ours[chunk * pp + stage]) == layers
            assert theirs.get_layer_id_list(LayerType.decoder, vp_stage=chunk, pp_rank=stage) == layers
        layout = LayoutConfig(pp=pp, vpp=vpp, pipeline_model_parallel_layout=text)
        assert stage_layers(layout, sum(counts), stage) == sum(counts[stage::pp])


@pytest.mark.parametrize(
    ("text", "counts"),
    [("Ett|(ttt|)*2tL", [2, 3, 3, 1]), ("E,t*2|t, t|tL", [2, 2, 1]), ("E(t|)*3tL", [1, 1, 1, 1])],
)
def test_its_repetitions(text: str, counts: list[int]) -> None:
    assert [len(r) for r in chunk_layers(sum(counts), len(counts), 1, text)] == counts
    assert [
        StageLayout(text.replace(" ", ""), len(counts), s).get_num_layers_to_build()
        for s in range(len(counts))
    ] == counts


def test_a_way_out_for_layers_that_stages_do_not_divide() -> None:
    with pytest.raises(InputError, match=r"'Et\*15\|t\*16\|t\*16\|t\*15L'") as caught:
        chunk_layers(62, 4, 1, None)
    assert [len(r) for r in chunk_layers(62, 4, 1, "Et*15|t*16|t*16|t*15L")] == [15, 16, 16, 15]
    assert caught.value.where == "pp"
