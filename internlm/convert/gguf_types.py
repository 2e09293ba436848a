"""Number formats of weights in GGUF: how they are stored, and how large their rounding errors are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType

TYPES = ("f32", "f16", "bf16", "q8_0")
QUANTIZED_BLOCK = 32
"""Weights that share a scale in q8_0: rows must be a multiple of it."""


def type_of(shape: tuple[int, ...], wanted: str) -> str:
    """The type of a weight in a file of type `wanted`: vectors are f32, rows that q8_0 cannot cut into blocks f16."""
    if len(shape) == 1:
        return "f32"
    return "f16" if wanted == "q8_0" and shape[-1] % QUANTIZED_BLOCK else wanted


def torch_dtype(name: str) -> torch.dtype:
    """The dtype in which values of a type are before they are stored; q8_0 is made of fp32."""
    return {"f16": torch.float16, "bf16": torch.bfloat16}.get(name, torch.float32)


def ggml_type(name: str) -> GGMLQuantizationType:
    """The number of a type in the file."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[name.upper()]


def stored(tensor: Tensor, name: str) -> Any:
    """A tensor of `torch_dtype(name)` as the numpy array that is written."""
    from gguf.quants import quantize

    if name == "q8_0":
        return quantize(tensor.numpy(), ggml_type(name))
    return tensor.view(torch.uint16).numpy() if name == "bf16" else tensor.numpy()


def with_errors_of(tensor: Tensor, wanted: str, generator: torch.Generator) -> Tensor:
    """A weight with random errors as large as those of rounding to the type, also where it has no digits to lose.

    Args:
        tensor: the weight, in fp32.
        wanted: type of the file.
        generator: of the errors.
    """
    name = type_of(tuple(tensor.shape), wanted)
    if name == "f32":
        return tensor
    uniform = 2.0 * torch.rand(tensor.shape, generator=generator) - 1.0
    if name == "q8_0":
        blocks = tensor.unflatten(-1, (-1, QUANTIZED_BLOCK))
        step = blocks.abs().amax(-1, keepdim=True) / 127
        return (blocks + 0.5 * step * uniform.view_as(blocks)).view_as(tensor)
    return tensor * (1.0 + 0.5 * torch.finfo(torch_dtype(name)).eps * uniform)
