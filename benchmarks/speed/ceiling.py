"""What this machine's matrix products allow: the rate of the very products of a model, and the time of a step at it.

The limit of a step is the sum over its products of their own measured times: every linear layer and the head, forward
and both gradients, and the two products of attention, of which causal attention needs half. Nothing else of a step is
in it: no norms, no softmax, no optimizer, no memory traffic.
"""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from internlm.config.loader import load_config
from internlm.initialize.stages import build_meta_model
from internlm.model.architecture import Architecture

_REPETITIONS = {"cuda": 10, "cpu": 1}
_LARGEST_SCORES = 1 << 29
"""Elements of the attention scores that are multiplied at once; more heads are counted by their number."""


class Ceiling:
    """The products of a config's model, and what they take.

    Args:
        overrides: of the config file, as for the contender.
        device: to measure.
    """

    def __init__(self, config_file: Path, overrides: list[str], device: torch.device) -> None:
        config = load_config(config_file, overrides).config
        model = build_meta_model(config)
        architecture = model.architecture
        assert isinstance(architecture, Architecture)
        self.device, self.dtype = device, architecture.dtype
        self.micro_num = config.data.micro_num
        self.tokens = config.data.packed_length
        self.linears = Counter(
            tuple(module.weight.shape) for module in model.modules() if isinstance(module, nn.Linear)
        )
        if architecture.tie_word_embeddings:
            self.linears[architecture.vocab_size, architecture.hidden_size] += 1
        self.rows = config.data.micro_bsz * architecture.num_heads
        self.layers = architecture.num_layers
        self.seq, self.head_dim = config.data.seq_len, architecture.head_dim

    @torch.no_grad()
    def measure(self) -> dict[str, Any]:
        """One round: rates in FLOP/s, and the limit of a step in seconds."""
        linear_seconds = linear_flops = 0.0
        products = {}
        for (rows, columns), count in self.linears.items():
            x, weight, gradient = (
                self._new(self.tokens, columns),
                self._new(rows, columns),
                self._new(self.tokens, rows),
            )
            seconds = (
                self._time(lambda x=x, w=weight: x @ w.t()),
                self._time(lambda g=gradient, w=weight: g @ w),
                self._time(lambda g=gradient, x=x: g.t() @ x),
            )
            flops = 2.0 * self.tokens * rows * columns
            products[f"{rows} x {columns}"] = [flops / each for each in seconds]
            linear_seconds += count * sum(seconds)
            linear_flops += count * 3 * flops
        rows = max(1, min(self.rows, _LARGEST_SCORES // self.seq**2))
        queries, scores = self._new(rows, self.seq, self.head_dim), self._new(rows, self.seq, self.seq)
        pair = self._time(lambda: queries @ queries.transpose(1, 2)) + self._time(lambda: scores @ queries)
        attention_seconds = self.layers * 3 * pair * self.rows / rows / 2
        return {
            "ceiling_flops": linear_flops / linear_seconds,
            "attention_ceiling_flops": 4.0 * rows * self.seq**2 * self.head_dim / pair,
            "limit_seconds": self.micro_num * (linear_seconds + attention_seconds),
            "products": products,
        }

    def _new(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    def _time(self, product: Any) -> float:
        """Seconds of one product."""
        repetitions = _REPETITIONS[self.device.type]
        product()
        self._wait()
        started = time.perf_counter()
        for _ in range(repetitions):
            product()
        self._wait()
        return (time.perf_counter() - started) / repetitions

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
