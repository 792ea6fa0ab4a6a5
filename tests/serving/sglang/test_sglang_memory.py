"""The formula of a server's KV cache (recipe/memory.py) is the installed SGLang's, read by its own function.

A GPU's free memory cannot be had here: that one figure, and the server's settings, are made up.
"""

from __future__ import annotations

import pytest

from genac_megatron.recipe.memory import kv_pool
from genac_megatron.recipe.share import GIB
from tests.serving.zygote import AskingZygote

PROBE = """
from types import SimpleNamespace
from unittest.mock import MagicMock
import sglang.srt.mem_cache.kv_cache_configurator as module
found = []
for start, now, fraction in given:
    module.get_available_gpu_memory = lambda *_, now=now, **__: now
    module.get_parallel = lambda: SimpleNamespace(launch_world_size=1, world_group=MagicMock())
    module.get_exec = MagicMock()
    module.get_disagg = lambda: SimpleNamespace(disaggregation_mode="null")
    module.get_mm = MagicMock()
    module.mm_runtime_reservation_gb = lambda **_: 0.0
    module.get_schedule = lambda fraction=fraction: SimpleNamespace(
        mem_fraction_static=fraction, prefill_max_requests=None, max_mamba_cache_size=None)
    own = SimpleNamespace(device="cuda", gpu_id=0, mambaish_config=None, post_capture_kv_active=False,
                          model_config=SimpleNamespace(is_multimodal=False))
    try:
        found.append(module.KVCacheConfigurator._profile_available_bytes(own, start))
    except ValueError as error:
        found.append(str(error))
"""
CASES = [(78.0, 62.7, 0.5), (78.0, 62.7, 0.3), (40.0, 24.7, 0.75), (78.0, 40.0, 0.3)]  # the last: a race


@pytest.mark.slow
def test_the_installed_sglang_has_this_formula(zygote: AskingZygote) -> None:
    found = zygote.ask(PROBE, CASES)
    for (start, now, fraction), pool in zip(CASES, found, strict=True):
        ours = kv_pool(start * GIB, now * GIB, fraction)
        if ours > 0:
            assert pool == pytest.approx(ours, abs=2)
        else:
            assert "leave no GPU memory for the KV cache" in pool
    assert isinstance(found[-1], str)
