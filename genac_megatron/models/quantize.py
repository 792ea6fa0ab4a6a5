"""Weights to FP8 in blocks of 128 x 128, as engines serve them (models/blockwise.py), and back.

Of a block with largest magnitude a: s = 2^ceil(log2(a / 448)), q = e4m3(w / s), and w is served as q s. 448
is the largest number of float8_e4m3fn, whose 3 bits of mantissa give

    |w - q s| <= max(|w| / 16, s / 1024),   s < a / 224

(half a step: 2^-4 of a normal number, 2^-10 below 2^-6). Scales are powers of two, at no cost of precision in
a floating-point format (one of its 15 powers of two is unused). So q s is a bf16 number exactly, is found
again when it is quantized once more (SGLang's DeepGEMM does so on Blackwell), and follows Transformer
Engine's `Float8BlockScaling`, whose scales are powers of two as well.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from genac_megatron.models.blockwise import BLOCK, scale_size

FP8 = torch.float8_e4m3fn
LARGEST = 448.0
SMALLEST_SCALE = 2.0**-126  # GPUs take smaller ones for zero
ELEMENTS_AT_ONCE = 1 << 24  # bounds the fp32 temporaries to 64 MiB each


@torch.no_grad()
def quantize(
    weight: Tensor, quantized: Tensor | None = None, scales: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A weight [rows, columns] as float8_e4m3fn [rows, columns] and fp32 scales, one per block.

    Into `quantized` and `scales` where they are given. A block that holds NaN or infinity becomes NaN.
    """
    rows, columns = weight.shape
    if quantized is None:
        quantized = torch.empty(rows, columns, dtype=FP8, device=weight.device)
    if scales is None:
        scales = torch.empty(scale_size((rows, columns)), dtype=torch.float32, device=weight.device)
    step = max(1, ELEMENTS_AT_ONCE // (columns * BLOCK)) * BLOCK
    for start in range(0, rows, step):
        part = weight[start : start + step].float()
        found = _scales(part)
        scales[start // BLOCK : start // BLOCK + found.size(0)] = found
        quantized[start : start + step] = (part / _spread(found, part.shape)).clamp(-LARGEST, LARGEST).to(FP8)
    return quantized, scales


@torch.no_grad()
def dequantize(quantized: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight [rows, columns] that an engine multiplies with."""
    rows, columns = quantized.shape
    made = torch.empty(rows, columns, dtype=dtype, device=quantized.device)
    step = max(1, ELEMENTS_AT_ONCE // (columns * BLOCK)) * BLOCK
    for start in range(0, rows, step):
        part = quantized[start : start + step].float()
        its = scales[start // BLOCK : -(-(start + part.size(0)) // BLOCK)]
        made[start : start + step] = part * _spread(its, part.shape)
    return made


def _scales(part: Tensor) -> Tensor:
    """[rows / 128, columns / 128] of fp32 [rows, columns]."""
    rows, columns = part.shape
    whole = nn.functional.pad(part.abs(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = whole.view(whole.size(0) // BLOCK, BLOCK, whole.size(1) // BLOCK, BLOCK)
    largest = blocks.amax((1, 3))
    mantissa, exponent = torch.frexp(largest / LARGEST)  # largest / 448 = mantissa 2^exponent, from 0.5 to 1
    exponent = exponent - (mantissa == 0.5).int()
    scales = torch.ldexp(torch.ones_like(largest), exponent).clamp(min=SMALLEST_SCALE)
    scales = torch.where(largest == 0, torch.ones_like(scales), scales)
    return torch.where(largest.isfinite(), scales, torch.full_like(scales, torch.nan))


def _spread(scales: Tensor, size: torch.Size) -> Tensor:
    """A block's scale at each of its elements."""
    rows = scales.repeat_interleave(BLOCK, 0)[: size[0]]
    return rows.repeat_interleave(BLOCK, 1)[:, : size[1]]
