"""How many floating-point operations a token of training costs, and how many a device can do.

Owns the arithmetic and the table of datasheet peaks. Knows a model only by its dimensions.

Only the operations of the model are counted (MFU, not HFU): three times the forward pass, never the recomputation of
activation checkpointing, and only matrix products, which is all that a datasheet peak is about. Two conventions are in
use for the scores of causal attention, and their MFUs must not be compared with each other:

- "full": the S x S square, as if every token attended to every other (PaLM, https://arxiv.org/abs/2204.02311, app. B);
- "causal": half of it, which is what a causal kernel computes.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

if TYPE_CHECKING:
    from internlm.model.architecture import Architecture

Convention = Literal["full", "causal"]


@dataclass(frozen=True)
class ModelShape:
    """The dimensions of a decoder with a gated feed-forward layer (three matrices) in every layer.

    Attributes:
        ffn_size: width of the feed-forward layer.
        vocab_size: rows of the output head.
        windows: the attention window of each layer, None for a layer that sees everything; empty: all see everything.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    ffn_size: int
    vocab_size: int
    windows: tuple[int | None, ...] = ()

    @classmethod
    def of(cls, architecture: Architecture) -> ModelShape:
        """The dimensions of a decoder of `internlm.model`."""
        a = architecture
        return cls(
            num_layers=a.num_layers,
            hidden_size=a.hidden_size,
            num_heads=a.num_heads,
            num_kv_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            ffn_size=a.intermediate_size,
            vocab_size=1 if a.is_reward else a.vocab_size,
            windows=a.windows,
        )

    @property
    def matmul_parameters(self) -> int:
        """Weights that every token is multiplied with: all but the embedding (a lookup), norms and biases."""
        queries_keys_values = self.hidden_size * (self.num_heads + 2 * self.num_kv_heads) * self.head_dim
        attention_output = self.num_heads * self.head_dim * self.hidden_size
        feed_forward = 3 * self.hidden_size * self.ffn_size
        layer = queries_keys_values + attention_output + feed_forward
        return self.num_layers * layer + self.hidden_size * self.vocab_size


def flops_per_token(shape: ModelShape, seq_len: int, convention: Convention) -> float:
    """Floating-point operations to train on one token: forward and backward, without recomputation.

    Args:
        seq_len: tokens of an attention segment; packed documents shorter than that are counted as if they were whole.
        convention: how attention scores are counted, "full" or "causal".
    """
    # A multiply and an add for each weight, and for each key that a query of a head sees, in scores and in values.
    keys_seen = sum(_mean_keys(seq_len, window, convention) for window in shape.windows or (None,) * shape.num_layers)
    forward = 2 * shape.matmul_parameters + 4 * shape.num_heads * shape.head_dim * keys_seen
    return 3.0 * forward


def _mean_keys(seq_len: int, window: int | None, convention: Convention) -> float:
    """Keys that a query of one layer is counted to see, on average over the sequence."""
    width = seq_len if window is None else min(window, seq_len)
    # With a window the queries of its first `width` positions see half of it on average, the others all of it.
    return float(width) if convention == "full" else width - width**2 / (2 * seq_len)


# Dense bf16 tensor TFLOP/s of the vendors' datasheets, without sparsity. The first name found in the device's name
# counts, so that variants come before their family.
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
    """The datasheet peak of a device in FLOP/s, or None where none is known.

    Args:
        device_name: as `torch.cuda.get_device_name()` gives it, for example "NVIDIA H100 80GB HBM3".
        dtype: that of the matrix products; only bf16 and fp16 have a peak here, which is the same for both.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return None
    # Whole words only: an "H20" is no "H200", and an "L4" no "L40".
    words = f" {re.sub(r'[^a-z0-9]+', ' ', device_name.lower())} "
    return next((tflops * 1e12 for name, tflops in _PEAK_BF16_TFLOPS if f" {name} " in words), None)
