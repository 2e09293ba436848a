"""The planner of recomputation: the least that fits, against all plans there are."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from internlm.config.schema import ModelConfig
from internlm.core.context.layout import ParallelLayout
from internlm.estimate.activations import LayerActivations
from internlm.estimate.dimensions import ModelDimensions
from internlm.initialize.recomputation_plan import plan_activations
from internlm.model.architecture import Architecture
from internlm.model.recompute import SAVE_POLICIES
from internlm.utils.errors import ConfigError

LAYERS = 5


def sizes(windowed: bool = False) -> LayerActivations:
    config = ModelConfig(
        vocab_size=64, hidden_size=64, num_layers=LAYERS, num_attention_heads=4, intermediate_size=96,
        use_sliding_window=windowed, sliding_window=8 if windowed else None, max_window_layers=2,
    )  # fmt: skip
    dimensions = ModelDimensions.of(Architecture.resolve(config))
    return LayerActivations(dimensions, ParallelLayout(), tokens=128, row_length=64)


@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.2, 0.35, 0.5, 0.77, 0.9, 1.0])
def test_no_other_plan_that_fits_repeats_less(share: float, windowed: bool) -> None:
    one = sizes(windowed)
    windows = one.dimensions.windows
    budget = share * LAYERS * one.saved_bytes("everything")

    def cost(keeps: tuple) -> tuple[float, int]:
        again = sum(one.recomputed_flops(keep, window) for keep, window in zip(keeps, windows, strict=True))
        return again, sum(keep != "everything" for keep in keeps)

    fitting = [
        keeps
        for keeps in itertools.product(SAVE_POLICIES, repeat=LAYERS)
        if sum(one.saved_bytes(keep) for keep in keeps) <= budget
    ]
    plan = plan_activations(one, range(LAYERS), budget)
    keeps = tuple(plan.policies[layer] for layer in range(LAYERS))
    assert keeps in fitting
    assert cost(keeps) == pytest.approx(min(map(cost, fitting)))
    assert plan.saved_bytes == sum(one.saved_bytes(keep) for keep in keeps)
    assert plan.recomputed_flops == pytest.approx(cost(keeps)[0])


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.8, 1.0])
def test_dense_layers_and_layers_with_experts_share_a_budget(share: float) -> None:
    config = ModelConfig(
        vocab_size=64, hidden_size=64, num_layers=LAYERS, num_attention_heads=4, intermediate_size=96, num_experts=8,
        top_k=2, moe_type="Dropless", moe_intermediate_size=32, mlp_only_layers=[0, 3],
    )  # fmt: skip
    layer = LayerActivations(
        ModelDimensions.of(Architecture.resolve(config, shared_mix="sum")), ParallelLayout(), tokens=128, row_length=64
    )
    ones = [layer.of(number) for number in range(LAYERS)]
    budget = share * sum(one.saved_bytes("everything") for one in ones)

    def cost(keeps: tuple) -> tuple[float, int]:
        again = sum(one.recomputed_flops(keep, None) for one, keep in zip(ones, keeps, strict=True))
        return again, sum(keep != "everything" for keep in keeps)

    def saved(keeps: tuple) -> float:
        return sum(one.saved_bytes(keep) for one, keep in zip(ones, keeps, strict=True))

    least = saved(("nothing",) * LAYERS)
    if least > budget:
        with pytest.raises(ConfigError, match=f"{least / 2**30:.3g} GiB per micro-batch even with full"):
            plan_activations(layer, range(LAYERS), budget)
        return
    fitting = [keeps for keeps in itertools.product(SAVE_POLICIES, repeat=LAYERS) if saved(keeps) <= budget]
    plan = plan_activations(layer, range(LAYERS), budget)
    keeps = tuple(plan.policies[number] for number in range(LAYERS))
    assert cost(keeps) == pytest.approx(min(map(cost, fitting)))
    assert (plan.saved_bytes, plan.recomputed_flops) == pytest.approx((saved(keeps), cost(keeps)[0]))
    assert saved(keeps) <= budget


def test_a_plan_is_one_line_and_full_recomputation_comes_first() -> None:
    one = sizes()
    budget = 2 * one.saved_bytes("nothing") + 3 * one.saved_bytes("everything")
    plan = plan_activations(one, range(LAYERS), budget)
    assert list(plan.policies) == list(range(LAYERS))
    order = [SAVE_POLICIES.index(keep) for keep in plan.policies.values()]
    assert order == sorted(order, reverse=True)
    assert "\n" not in str(plan) and str(plan).startswith("of 5 layers ")


def test_what_does_not_fit_is_refused_with_what_it_takes() -> None:
    one = sizes()
    least = LAYERS * one.saved_bytes("nothing")
    assert set(plan_activations(one, range(LAYERS), least).policies.values()) == {"nothing"}
    with pytest.raises(ConfigError, match=rf"model.checkpoint_budget = .*saves {least / 2**30:.3g} GiB"):
        plan_activations(one, range(LAYERS), least - 1)


@pytest.mark.parametrize(("keep", "parts"), [("nothing", ("layer", "attention")), ("attention", ("layer",))])
def test_operations_are_those_that_torch_counts(keep: str, parts: tuple[str, ...]) -> None:
    """Against torch's counter over the products of a plain layer, with a full square of scores for attention."""
    one = sizes()
    a = one.dimensions
    h, heads, kv, d, f = a.hidden_size, a.num_heads, a.num_kv_heads, a.head_dim, a.intermediate_size
    rows, length = one.tokens // one.row_length, one.row_length
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        x = torch.empty(one.tokens, h)
        for width in ((heads + 2 * kv) * d, heads * d, f, f, f):
            x @ torch.empty(h, width)
        if "attention" in parts:
            q = torch.empty(rows * heads, length, d)
            (q @ q.transpose(1, 2)) @ q
    total = float(counter.get_total_flops())
    causal = 2.0 * 2 * rows * heads * length * length * d / 2 if "attention" in parts else 0.0
    assert one.recomputed_flops(keep, None) == total - causal  # type: ignore[arg-type]
