"""In the serving environment: SGLang's own model with weights in FP8, as a tensor-parallel rank has it.

Its process has imported SGLang by boot.py. A job is a JSON object {tp, port, payloads, arguments}, the
arguments those of `sglang serve`.

payloads: a file with one flat bucket per line, as `/update_weights_from_tensor` takes it. What a server does
with them is done here by the same code of SGLang, up to the layers' own post-processing, which asks for a GPU
or AMX. The answer: what its weights checker says of every parameter, the types and sizes of some, and what
that post-processing says.
"""

from __future__ import annotations

from types import SimpleNamespace


def held(rank: int, job: dict) -> dict:
    """What a rank has once it got every bucket."""
    model = build(rank, job["port"], job["arguments"])

    import torch.distributed
    from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater
    from sglang.srt.utils import MultiprocessingSerializer
    from sglang.srt.utils.weight_checker import WeightChecker

    updater = SimpleNamespace(get_model=lambda: model)
    with open(job["payloads"]) as file:
        for line in file:
            bucket = MultiprocessingSerializer.deserialize(line.strip())
            done = WeightUpdater._update_weights_from_flattened_bucket(updater, bucket)
            assert done[0], done
    said = WeightChecker(get_model=lambda: model).handle("checksum", role="target")
    parameters = {name: [str(p.dtype), list(p.shape)] for name, p in model.named_parameters()}
    found = {"sums": said["checksums"], "held": parameters, "refused": refused(model)}
    torch.distributed.barrier()  # rank 0 has the store: where it ended first, groups of others broke
    return found


def build(rank: int, port: int, arguments: list[str]):
    """The model that a server's rank has, with uninitialised weights."""
    import torch
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed.parallel_state import init_distributed_environment, initialize_model_parallel
    from sglang.srt.layers.dp_attention import initialize_dp_attention
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.model_loader.loader import _get_quantization_config, _initialize_model
    from sglang.srt.model_loader.utils import set_default_torch_dtype
    from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish
    from sglang.srt.server_args import prepare_server_args

    server_args = prepare_server_args(arguments)
    publish(server_args, role="scheduler", ranks=SpawnRanks(world_rank=rank))
    initialize_moe_config()
    init_distributed_environment(
        world_size=get_parallel().tp_size,
        rank=rank,
        distributed_init_method=f"tcp://127.0.0.1:{port}",
        local_rank=rank,
        backend="gloo",
    )
    initialize_model_parallel()
    initialize_dp_attention(server_args)
    config = ModelConfig.from_server_args(server_args)
    quantization = _get_quantization_config(config, LoadConfig())
    assert quantization is not None
    assert quantization.get_name() == "fp8"
    assert quantization.weight_block_size == [128, 128]
    with set_default_torch_dtype(config.dtype), torch.device("cpu"):
        return _initialize_model(config, LoadConfig(), quantization)


def refused(model) -> str:
    """What SGLang says where FP8 layers are made ready on this machine; "" where they are."""
    import torch
    from sglang.srt.model_loader.loader import DefaultModelLoader

    try:
        DefaultModelLoader.postprocess_weights(model, torch.device("cpu"))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
