"""What without_cuda.py fills is still missing: where this fails, take the filling out."""

from __future__ import annotations

import pytest

from genac_megatron.models.registry import FAMILIES
from genac_megatron.serving.sglang.without_cuda import MODELS, PAUSED
from tests.serving.zygote import AskingZygote

PROBE = """
import torch
from sglang.srt.managers.scheduler import Scheduler
methods = [name for name in without_cuda.PAUSED if callable(getattr(Scheduler, name, None))]
found = [torch.version.cuda, filled, len(without_cuda.other_models()), methods]
"""


@pytest.mark.slow
def test_the_import_gaps_are_still_there(zygote: AskingZygote) -> None:
    cuda, gaps, others, methods = zygote.ask(PROBE)
    # A CUDA build of torch, which some indexes offer to a CPU too, comes with triton and suits torchvision.
    wanted = ["triton", "sgl_kernel", "torchvision", "allocator", "pinned"]
    assert others > 100, "SGLang's models are elsewhere now: see without_cuda.other_models"
    assert gaps == [gap for gap in wanted if cuda is None or gap not in ("triton", "torchvision")]
    assert methods == list(PAUSED), "its loop has changed: see without_cuda.rest_while_paused"


def test_a_server_imports_the_models_of_every_family() -> None:
    assert set(MODELS) == set(FAMILIES)
