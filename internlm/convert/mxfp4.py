"""Weights in MXFP4, as in the published files of gpt-oss: numbers of 4 bits, 32 of which share a scale.

The format is that of the OCP Microscaling Formats (MX) Specification v1.0: elements are E2M1 (a sign, two bits of
exponent, one of mantissa), scales are E8M0 (powers of two). Every product of the two is a bf16 number, or overflows.

In the files a weight `[experts, in, out]` is two tensors of bytes: `NAME_blocks` `[experts, out, in / 32, 16]`, two
elements a byte, that of the lower bits first, and `NAME_scales` `[experts, out, in / 32]`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from internlm.utils.errors import CheckpointError

METHOD = "mxfp4"
"""`quant_method` in the `quantization_config` of a config.json."""
BLOCKS, SCALES = "_blocks", "_scales"
"""Suffixes of the names of the two tensors."""

_BYTES_OF_BLOCK = 16
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_SCALE_BIAS = 127
_NAN_SCALE = 255


def quantized_weights(tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]], where: str) -> dict[str, Tensor]:
    """The quantized weights of a folder.

    Args:
        tensors: name -> shape and dtype of the folder's tensors.
        where: the folder, for messages.

    Returns:
        Name of a weight, without suffix -> meta tensor of what `dequantize` returns.

    Raises:
        CheckpointError: one of the two tensors of a weight is missing, or they do not fit together.
    """
    found = {}
    stems = [name.removesuffix(suffix) for suffix in (BLOCKS, SCALES) for name in tensors if name.endswith(suffix)]
    for stem in dict.fromkeys(stems):
        for name in (stem + BLOCKS, stem + SCALES):
            if name not in tensors:
                raise CheckpointError(f"'{where}': '{name}' is missing, without which '{stem}' cannot be dequantized")
        (blocks, blocks_dtype), (scales, scales_dtype) = tensors[stem + BLOCKS], tensors[stem + SCALES]
        if (blocks_dtype, scales_dtype) != (torch.uint8, torch.uint8) or blocks != (*scales, _BYTES_OF_BLOCK):
            raise CheckpointError(
                f"'{where}': '{stem}{BLOCKS}' {blocks_dtype} {list(blocks)} and '{stem}{SCALES}' {scales_dtype} "
                f"{list(scales)} are not a weight in MXFP4, which has bytes [..., n, {_BYTES_OF_BLOCK}] and [..., n]"
            )
        if len(scales) != 3:
            raise CheckpointError(
                f"'{where}': '{stem}{SCALES}' has shape {list(scales)}, expected [experts, out, in / 32]"
            )
        experts, rows, groups = scales
        shape = (experts, groups * 2 * _BYTES_OF_BLOCK, rows)
        found[stem] = torch.empty(shape, dtype=torch.bfloat16, device="meta")
    return found


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """The exact values of a weight; one expert at a time, so that little memory is needed besides the result.

    Args:
        blocks: bytes `[experts, out, in / 32, 16]`.
        scales: bytes `[experts, out, in / 32]`.

    Returns:
        bf16 `[experts, in, out]`; inf where a value overflows bf16, NaN where a scale is NaN.
    """
    experts, rows, groups, _ = blocks.shape
    weight = torch.empty(experts, groups * 2 * _BYTES_OF_BLOCK, rows, dtype=torch.bfloat16)
    pairs = _pairs_of_bytes()
    for expert in range(experts):
        factors = torch.ldexp(torch.ones(rows, groups), scales[expert].int() - _SCALE_BIAS)
        factors[scales[expert] == _NAN_SCALE] = torch.nan
        elements = pairs.index_select(0, blocks[expert].flatten().int()).view(torch.bfloat16).view(rows, groups, -1)
        weight[expert] = (elements * factors.bfloat16().unsqueeze(-1)).flatten(-2).t()
    return weight


def _pairs_of_bytes() -> Tensor:
    """The two elements of each byte: the bits of bf16 [256, 2] as int32 [256], for a lookup of both at once."""
    elements = torch.tensor([*_MAGNITUDES, *(-magnitude for magnitude in _MAGNITUDES)], dtype=torch.bfloat16)
    numbers = torch.arange(256)
    return torch.stack([elements[numbers % 16], elements[numbers // 16]], dim=1).view(torch.int32).flatten()
