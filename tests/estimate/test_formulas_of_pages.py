"""Formulas and numbers of doc/parallelism.md and doc/memory.md, computed with the functions that they name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from helpers.pages import text_of

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.parallel.model_parallel import ParallelOptions
from internlm.estimate.activation_traffic import layer_activations_sent
from internlm.estimate.activations import LayerActivations
from internlm.estimate.dimensions import ModelDimensions
from internlm.estimate.flops import flops_per_token
from internlm.estimate.parameters import RankParameters
from internlm.estimate.training_step import TrainingStep
from internlm.initialize.recomputation_plan import plan_activations
from internlm.solver.optimizer.state_form import FP32_STATE

INTERNLM2_7B = ModelDimensions(
    num_layers=32, hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128, intermediate_size=14336,
    vocab_size=92544,
)  # fmt: skip
TOKENS = 4096


def sent_by_a_layer(mode: str, t: int, tokens: int = TOKENS) -> float:
    layout = ParallelLayout(world_size=t, tensor=t, weight=t if mode == "isp" else 1, mode=mode)  # type: ignore[arg-type]
    held = RankParameters(ParallelContext(layout, 0, torch.device("cpu")), (range(1),), False, False, ())
    step = TrainingStep(INTERNLM2_7B, tokens, (tokens,), 1, {0: "everything"}, ParallelOptions(), FP32_STATE)
    return layer_activations_sent(held, step, "everything")


@pytest.mark.parametrize("t", [2, 4, 8])
def test_communication_of_the_modes(t: int) -> None:
    m, b = INTERNLM2_7B, 2
    page = text_of("doc/parallelism.md")
    assert page.count("`8 T h b (t-1)/t`") == 2 and "`10 T h b (t-1)/t`" in page
    unit = TOKENS * m.hidden_size * b * (t - 1) / t
    assert [sent_by_a_layer(mode, t) for mode in ("mtp", "msp", "fsp")] == [8 * unit, 8 * unit, 10 * unit]
    assert "`4 (T/t) (H + K') d b (t-1)/t`" in page
    heads = m.num_heads + max(m.num_kv_heads, t)
    assert sent_by_a_layer("isp", t) == 4 * (TOKENS / t) * heads * m.head_dim * b * (t - 1) / t


def test_tokens_from_which_isp_sends_less_than_msp() -> None:
    """Without the all-to-alls, which the page leaves out of its comparison."""
    m, b, g = INTERNLM2_7B, 2, 4
    weights = m.layer_parameters * (2 * b + g)
    per_token = sent_by_a_layer("msp", 2, 1) / (1 / 2)
    assert f"{weights / per_token:,.0f} for InternLM2 7B" in text_of("doc/parallelism.md")


def test_bytes_that_a_layer_saves_for_a_token() -> None:
    """The column of the example, without the softmax's statistics."""
    layer = LayerActivations(INTERNLM2_7B, ParallelLayout(), 1, TOKENS)
    page = text_of("doc/memory.md")
    for policy, name in (("everything", "everything"), ("matmuls", '`"matmuls"`'), ("attention", '`"attention"`')):
        row = next(line for line in page.splitlines() if line.startswith(f"| {name}") and "KiB" in line)
        size = layer.saved_bytes(policy) - 4 * INTERNLM2_7B.num_heads  # type: ignore[arg-type]
        statistics = 2 * 4 if policy == "everything" else 0
        assert f"| {(size - statistics) / 1024:.0f} KiB |" in row
    assert f"{layer.saved_bytes('nothing') / 1024:.0f} KiB" in page


def test_the_log_line_of_a_budget() -> None:
    layer = LayerActivations(INTERNLM2_7B, ParallelLayout(), TOKENS, TOKENS)
    line = f"activations: {plan_activations(layer, range(32), 12 * 2**30)}"
    assert line in " ".join(text_of("doc/memory.md").split())


def test_flops_of_a_layer_for_a_token() -> None:
    """The forward pass that hides an offloaded layer's copies."""
    one = replace(INTERNLM2_7B, num_layers=1, vocab_size=0)
    flops = flops_per_token(one, TOKENS, "causal") / 3
    assert f"a layer of a 7B model computes {flops / 1e9:.2f} GFLOP" in " ".join(text_of("doc/memory.md").split())
