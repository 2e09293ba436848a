"""No copies of weights beyond what a mode needs: bytes against the formulas of doc/parallelism.md.

The model is wide and the batch short, so that weights outweigh activations; these are measured with the same model in
the trivial mode and taken off.
"""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from helpers.memory import PeakMemory
from helpers.tiny import micro_batch, tiny_config
from torch import nn

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.linear.weight_gathering import GatherPlan
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.modes.isp import Isp
from internlm.core.parallel.parallelize import parallelize
from internlm.model.ops.attention.causal_attention import VarlenMetadata
from internlm.model.ops.cross_entropy import linear_cross_entropy
from internlm.model.registry import build_model

FLOAT = 4
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_kv_attention_heads": 4}
WQKV, WO, W1, W3, W2 = 3 * 128 * 128, 128 * 128, 256 * 128, 256 * 128, 128 * 256
EMBEDDING = HEAD = 61 * 128
LAYER = WQKV + WO + W1 + W3 + W2


def build(layout: ParallelLayout, options: ParallelOptions) -> nn.Module:
    with torch.device("meta"):
        model = build_model("INTERNLM2", tiny_config(num_layers=3, **SHAPE))
    trivial = ParallelContext(ParallelLayout(), 0, torch.device("cpu"))
    context = trivial if layout.world_size == 1 else ParallelContext.create(layout)
    return parallelize(model, context, options=options)


class GatherLog(list[tuple[str, str]]):
    """What isp's gathers did, and the most elements that were gathered at once."""

    SIZES: ClassVar = {"wqkv": WQKV, "wo": WO, "w1": W1 + W3, "w2": W2}

    @property
    def peak(self) -> int:
        live = peak = 0
        for event, name in self:
            size = self.SIZES[name.rpartition(".")[2]]
            live += size if event == "launch" else -size if event == "release" else 0
            peak = max(peak, live)
        return peak


def held_and_peaks(layout: dict[str, Any], options: dict[str, Any]) -> tuple[int, int, int]:
    """Bytes of parameters, and the most that a forward pass (and a forward and backward pass) adds to them."""
    return _held_and_peaks(layout, options)[:3]


def _held_and_peaks(layout: dict[str, Any], options: dict[str, Any]) -> tuple[int, int, int, int]:
    """As `held_and_peaks`, and the most elements of weights that isp had gathered at once in the forward pass."""
    model = build(ParallelLayout(**layout), ParallelOptions(**options))
    parallel = parallel_of(model)
    micro = micro_batch(0, (3, 5))
    assert micro.lengths is not None
    varlen = VarlenMetadata.of(micro.lengths)
    log = GatherLog()
    if isinstance(parallel, Isp):
        parallel.gathered_weights.log = log
    with torch.no_grad(), PeakMemory() as forward:
        model(micro.input_ids, micro.position_ids, varlen)
    gathered = log.peak
    with PeakMemory() as both:
        hidden = model(micro.input_ids, micro.position_ids, varlen)
        output = parallel.head_loss(model, hidden, micro.labels, micro.type_ids, linear_cross_entropy)
        output.loss.loss_sum.backward()
        parallel.end_backward()
    held = sum(parameter.numel() * FLOAT for parameter in model.parameters())
    parallel.context.close()
    return held, forward.peak, both.peak, gathered


@pytest.mark.parametrize("mode", ["mtp", "msp", "fsp"])
def test_tensor_ranks_hold_a_share_and_make_no_copies(mode: str, ranks: Any) -> None:
    whole, activations, both = held_and_peaks({}, {})
    norms = 7 * 128 * FLOAT
    for held, forward, with_backward in ranks(2).run(held_and_peaks, {"world_size": 2, "tensor": 2, "mode": mode}, {}):
        # 61 classes make blocks of 31 rows: one row of the head is padding; the embedding is split over hidden.
        assert held == norms + (whole - norms + 128 * FLOAT) // 2
        # Activations and exchange buffers of 8 tokens; no weight (the smallest, wo, has 8,192 elements here).
        assert forward <= activations + WO // 2 * FLOAT
        # Gradients are as large as the weights, and the trivial run has whole ones.
        assert with_backward <= both - whole // 2 + WO // 2 * FLOAT


@pytest.mark.parametrize(
    ("options", "gathered"),
    [
        ({}, W1 + W3),
        ({"weight_gathering": GatherPlan(overlap=True, ahead="module")}, W1 + W3 + max(WO, W2)),
        # By layer: this layer's and the next one's, less what of this one has computed at the launch (wqkv, before wo).
        ({"weight_gathering": GatherPlan(overlap=True, ahead="layer")}, 2 * LAYER - WQKV),
    ],
)
def test_isp_gathers_what_it_needs_and_no_more(options: dict[str, Any], gathered: int, ranks: Any) -> None:
    whole, activations, _ = held_and_peaks({}, {})
    norms = 7 * 128 * FLOAT
    layout = {"world_size": 2, "weight": 2, "mode": "isp"}
    for held, forward, _, gathered_by_design in ranks(2).run(_held_and_peaks, layout, options):
        assert held == norms + (whole - norms + 2 * 128 * FLOAT) // 2
        assert gathered_by_design == gathered
        # gloo's own thread lets go of a buffer a moment after the wait for it: one more of the largest may live.
        assert gathered * FLOAT <= forward <= (gathered + W1 + W3) * FLOAT + activations
