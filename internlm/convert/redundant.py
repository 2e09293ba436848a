"""Redundant tensors in foreign files, which the config or another tensor determines.

They are compared before they are dropped. A difference means that the file contains another model than its config
describes.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from internlm.model.modules.rotary import RopeSettings, inverse_frequencies

_FREQUENCIES = re.compile(r"(^|\.)(inv_freq|rope\.freqs)$")
_TABLES = re.compile(r"\.rotary_emb\.(cos|sin)_cached$")
_POSITIONS = re.compile(r"(^|\.)position_ids$")
_ROUNDINGS = 8
"""Tolerance in roundings of the buffer's dtype, in which some buffers were computed."""
_COMPARED_POSITIONS = 16


def is_buffer(name: str) -> bool:
    """Whether a tensor is a buffer that old library versions saved although the config determines it."""
    return any(pattern.search(name) for pattern in (_FREQUENCIES, _TABLES, _POSITIONS))


def buffer_difference(name: str, tensor: Tensor, rope: RopeSettings) -> str | None:
    """Describe how a buffer differs from what the config gives; None if it does not.

    Args:
        name: of the buffer.
        tensor: values of the buffer.
        rope: of the config. The buffer may contain the frequencies before or after scaling.
    """
    if _POSITIONS.search(name):
        expected = [torch.arange(tensor.shape[-1])]
    else:
        plain = RopeSettings(head_dim=rope.head_dim, base=rope.base)
        # Dynamic NTK scales with the length of a document; the buffer has the frequencies of a short one.
        scaled = plain if rope.rope_type == "dynamic" else rope
        expected = [inverse_frequencies(settings) for settings in (plain, scaled)]
    if _TABLES.search(name):
        positions = torch.arange(min(_COMPARED_POSITIONS, tensor.numel() // rope.head_dim), dtype=torch.float32)
        angles = [torch.outer(positions, frequencies).repeat(1, 2) for frequencies in expected]
        expected = [angle.cos() if name.endswith("cos_cached") else angle.sin() for angle in angles]
        tensor = tensor.reshape(-1, rope.head_dim)[: len(positions)] if tensor.numel() % rope.head_dim == 0 else tensor
    if any(_is_close(tensor, values) for values in expected):
        return None
    if _FREQUENCIES.search(name) and tensor.numel() == rope.head_dim // 2 > 1 and float(tensor.flatten()[1]) > 0:
        base = float(tensor.flatten()[1]) ** (-rope.head_dim / 2)
        return f"'{name}' has the frequencies of a rotary base of about {base:.6g}, the config says {rope.base:.6g}"
    return f"'{name}' contradicts the config (rotary base {rope.base:.6g}, head_dim {rope.head_dim})"


def tied_difference(head: Tensor, embedding: Tensor, called: str = "the embedding") -> str | None:
    """Describe how a tied head differs from its embedding, or a copy from its original; None if it does not."""
    if head.shape != embedding.shape:
        return f"has shape {list(head.shape)}, {called} {list(embedding.shape)}"
    embedding = embedding.to(head.dtype)
    if torch.equal(head, embedding):
        return None
    different = int((head != embedding).sum())
    largest = float((head.float() - embedding.float()).abs().max())
    return f"differs from {called} in {different:,} of {head.numel():,} values, by up to {largest:.3g}"


def _is_close(tensor: Tensor, expected: Tensor) -> bool:
    if tensor.numel() != expected.numel():
        return False
    if not tensor.dtype.is_floating_point:
        return torch.equal(tensor.flatten(), expected.flatten().to(tensor.dtype))
    info = torch.finfo(tensor.dtype)
    return torch.allclose(
        tensor.flatten().float(),
        expected.flatten().to(tensor.dtype).float(),
        rtol=_ROUNDINGS * info.eps,
        atol=_ROUNDINGS * (info.eps if bool((expected < 0).any() or (expected == 0).any()) else info.smallest_normal),
    )
