"""Measures the rate of a model's GEMMs on this machine, and the lower bound that they set on the time of a step.

The bound is the sum of the measured times of the GEMMs of a step: those of every linear layer and the head, forward and
both gradients, and the two of attention, of which causal attention needs half. Norms, softmax, optimizer and memory
traffic are excluded.
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
from internlm.model.llava.model import Llava

_REPETITIONS = {"cuda": 10, "cpu": 1}
_LARGEST_SCORES = 1 << 29
"""Maximum elements of attention scores in one batched GEMM; the time for more heads is extrapolated."""


class Ceiling:
    """Times the GEMMs of a config's model.

    Args:
        config_file: config of the contenders.
        overrides: `KEY=VALUE` for the config, as for the contender.
        device: to measure.
    """

    def __init__(self, config_file: Path, overrides: list[str], device: torch.device) -> None:
        config = load_config(config_file, overrides).config
        model = build_meta_model(config)
        architecture = getattr(model, "architecture", None)
        if not isinstance(architecture, Architecture) or isinstance(model, Llava):
            raise ValueError(f"the GEMMs of a {config.model_type} are not known: add --no-ceiling")
        if architecture.experts is not None:
            raise ValueError(
                "the rows of an expert differ from step to step: add --no-ceiling for a mixture of experts"
            )
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
        """Measure one round: rates in FLOP/s, and the lower bound of a step in seconds."""
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
        """Seconds of one GEMM."""
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
