"""Rotary position embedding (https://arxiv.org/abs/2104.09864): rotates pairs of channels by position-dependent angles.

A pair is channels (i, i + R/2) in the half-split layout, (2i, 2i + 1) in the interleaved one, where R is the number of
rotated channels, the first ones of a head. The angles are computed
in `internlm/model/modules/rotary.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from internlm.model.ops.implementation_choice import Choice


def choice(device: torch.device) -> Choice:
    """The implementation of `apply_rotary`."""
    return Choice("own autograd function", "backward rotates by the same tables, so no activations are saved")


_CHUNK_ELEMENTS = 1 << 17
"""Elements rotated at once on CPU, so that their fp32 copies stay in the cache."""


@dataclass(frozen=True)
class RotaryTables:
    """Cosines and sines of one forward pass, shared by all layers.

    A rotated vector is `x * cos + partner(x) * sin`, where the partner of a channel is the other channel of its pair,
    and `sin` includes the sign: minus for the first of a pair.

    Attributes:
        cos, sin: `[B, S, 1, R]` for R rotated channels; the rotation is computed in their dtype (fp32, or that of the
            model).
        interleaved: whether a pair is two adjacent channels.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool

    @classmethod
    def of(cls, angles: Tensor, interleaved: bool, dtype: torch.dtype, factor: float = 1.0) -> RotaryTables:
        """Tables for the angles `[B, S, R/2]` of the pairs; cosines and sines are multiplied by `factor`."""
        cos, sin = angles.cos() * factor, angles.sin() * factor
        if interleaved:
            cos, sin = cos.repeat_interleave(2, -1), torch.stack((-sin, sin), -1).flatten(-2)
        else:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)
        return cls(cos.to(dtype).unsqueeze(2), sin.to(dtype).unsqueeze(2), interleaved)


def apply_rotary(x: Tensor, tables: RotaryTables) -> Tensor:
    """Rotate the first R channels of `x` `[B, S, N, D]`; the result has its dtype and is contiguous."""
    if torch.compiler.is_compiling():
        # As plain operators, which the compiler fuses with their neighbors.
        rotated, rest = x.split([tables.cos.shape[-1], x.shape[-1] - tables.cos.shape[-1]], dim=-1)
        wide = rotated.to(torch.promote_types(tables.cos.dtype, x.dtype))
        rotated = (wide * tables.cos + _partners(wide, tables.interleaved) * tables.sin).to(x.dtype)
        return torch.cat((rotated, rest), dim=-1) if rest.shape[-1] else rotated
    result: Tensor = _Rotate.apply(x, tables.cos, tables.sin, tables.interleaved)
    return result


def _partners(x: Tensor, interleaved: bool) -> Tensor:
    """x with the channels of each pair swapped."""
    if interleaved:
        return x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((second, first), dim=-1)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, out: Tensor, sign: int = 1) -> None:
    """Write x, rotated by `sign` times the angles, to `out`; both are `[B, S, N, D]`, of any strides."""
    num_rotated = cos.shape[-1]
    if num_rotated < x.shape[-1]:
        out[..., num_rotated:] = x[..., num_rotated:]
        x, out = x[..., :num_rotated], out[..., :num_rotated]
    dtype = torch.promote_types(cos.dtype, x.dtype)
    batch, length = x.shape[:2]
    if x.device.type != "cpu":
        wide = x.to(dtype)
        out.copy_((wide * cos).addcmul_(_partners(wide, interleaved), sin, value=sign))
        return
    step = max(1, _CHUNK_ELEMENTS // (x.shape[2] * x.shape[3]))
    for row in range(batch):
        for start in range(0, length, step):
            index = (row, slice(start, start + step))
            wide = x[index].to(dtype)
            rotated = torch.mul(wide, cos[index])
            out[index] = rotated.addcmul_(_partners(wide, interleaved), sin[index], value=sign)


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.interleaved = interleaved
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        _rotate(x, cos, sin, interleaved, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        cos, sin = ctx.saved_tensors
        out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
        _rotate(grad, cos, sin, ctx.interleaved, out, sign=-1)
        return out, None, None, None
