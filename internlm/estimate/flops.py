"""FLOPs of training, and the datasheet peaks that an MFU is relative to.

Model FLOPs (MFU, not HFU) are three times those of the forward pass, without recomputation. Only GEMMs count, as in a
datasheet peak. Two conventions are in use for the scores of causal attention, and their MFUs must
not be compared with each other:

- "full": the S x S square, as if every token attended to every other (PaLM, https://arxiv.org/abs/2204.02311, app. B);
- "causal": half of it, which is what a causal kernel computes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import torch

from internlm.estimate.dimensions import ModelDimensions
from internlm.model.hf_class.probe import AttentionCall

Convention = Literal["full", "causal"]


def flops_per_token(dimensions: ModelDimensions, seq_len: int, convention: Convention) -> float:
    """Model FLOPs to train on one token: forward and backward, without recomputation.

    Args:
        dimensions: dimensions of the model.
        seq_len: tokens of a sequence; packed documents count as one document of this length.
        convention: how attention scores are counted, "full" or "causal".
    """
    scores = sum(
        attention_flops_per_token(dimensions, seq_len, dimensions.window(layer), convention)
        for layer in range(dimensions.num_layers + dimensions.num_multi_token)
    )
    return 3.0 * (2 * dimensions.gemm_parameters + scores)


def attention_flops_per_token(
    dimensions: ModelDimensions, seq_len: int, window: int | None, convention: Convention
) -> float:
    """Forward FLOPs of one layer's attention for one token: scores, and the sum of values.

    Args:
        dimensions: dimensions of the model.
        seq_len: tokens of a sequence.
        window: attention window of the layer; None for full attention.
        convention: how attention scores are counted, "full" or "causal".
    """
    channels = dimensions.num_heads * (dimensions.head_dim + dimensions.value_dim)
    return 2.0 * channels * _keys_seen(seq_len, window, convention)


def class_flops_per_token(
    gemm_flops: float, calls: Iterable[AttentionCall], seq_len: int, convention: Convention
) -> float:
    """`flops_per_token` of a class of transformers.

    Args:
        gemm_flops: of a forward pass for one token, attention left out.
        calls: how its modules call attention.
        seq_len: tokens of a sequence.
        convention: how attention scores are counted, "full" or "causal".
    """
    scores = sum(
        2.0
        * call.heads.num_heads
        * (call.heads.head_dim + call.value_dim)
        * _keys_seen(seq_len, call.window, convention)
        for call in calls
    )
    return 3.0 * (gemm_flops + scores)


def _keys_seen(seq_len: int, window: int | None, convention: Convention) -> float:
    """Keys that a query attends to, on average."""
    width = min(window or seq_len, seq_len)
    # The first `width` queries of a row attend to half a window on average, all others to a full window.
    return float(width) if convention == "full" else width - width**2 / (2 * seq_len)


def head_flops_per_token(dimensions: ModelDimensions) -> float:
    """Model FLOPs of the output head for one token: forward, and backward for inputs and for weights."""
    return 6.0 * dimensions.head_parameters


# Dense bf16 tensor TFLOP/s of the vendors' datasheets, without sparsity. The first name found in the device's name
# counts, so variants precede their family.
_PEAK_BF16_TFLOPS: tuple[tuple[str, float], ...] = (
    ("gb200", 2500.0),
    ("b200", 2250.0),
    ("h200 nvl", 835.5),
    ("gh200", 989.4),
    ("h200", 989.4),
    ("h100 pcie", 756.5),
    ("h100 nvl", 835.5),
    ("h100", 989.4),
    ("h800 pcie", 756.5),
    ("h800", 989.4),
    ("h20", 148.0),
    ("a100", 312.0),
    ("a800", 312.0),
    ("a40", 149.7),
    ("a30", 165.0),
    ("a10", 125.0),
    ("l40s", 362.05),
    ("l40", 181.05),
    ("l4", 121.0),
    ("mi300x", 1307.4),
)


def peak_flops(device_name: str, dtype: torch.dtype) -> float | None:
    """The datasheet peak of a device in FLOP/s; None if it is unknown.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it, for example "NVIDIA H100 80GB HBM3".
        dtype: dtype of the GEMMs; only bf16 and fp16, whose peaks are equal, are known.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    # Whole words only: "H20" must not match "H200", nor "L4" "L40".
    words = f" {re.sub(r'[^a-z0-9]+', ' ', device_name.lower())} "
    return next((tflops * 1e12 for name, tflops in _PEAK_BF16_TFLOPS if f" {name} " in words), None)
