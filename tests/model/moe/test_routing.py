from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from helpers.routing import choice_in_a_loop, router_forms, scores_in_a_loop, weights_in_a_loop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from internlm.model.moe.router_form import RouterForm
from internlm.model.moe.routing import choose_experts, expert_distribution, probabilities, weights_of

DTYPES = (torch.float32, torch.float64)
SOFTMAX = RouterForm(num_experts=8, top_k=3)
SIGMOID = RouterForm(num_experts=8, top_k=3, scores="sigmoid", has_bias=True)
GROUPED = RouterForm(num_experts=8, top_k=3, scores="sigmoid", num_groups=4, top_groups=2, group_score="top2_sum")


@pytest.fixture(params=["cpu", "other devices"])
def _selection(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test runs with the selection of CPUs and with that of other devices."""
    if request.param != "cpu":
        monkeypatch.setattr(torch.Tensor, "is_cpu", False)


with_each_selection = pytest.mark.usefixtures("_selection")
many = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
few = settings(max_examples=40, deadline=None)


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- loops over tokens and experts ----------------------------------------------------------------------------------


@few
@given(router_forms(), st.data())
def test_scores_equal_the_formula(form: RouterForm, data: st.DataObject) -> None:
    row = st.lists(st.floats(-40, 40), min_size=form.num_experts, max_size=form.num_experts)
    logits = data.draw(st.lists(row, min_size=1, max_size=4))
    scores = probabilities(torch.tensor(logits, dtype=torch.float64), form)
    np.testing.assert_allclose(scores.numpy(), [scores_in_a_loop(each, form) for each in logits], rtol=1e-12, atol=0)


@with_each_selection
@many
@given(router_forms(), st.sampled_from(DTYPES), st.data())
def test_choice_equals_the_loop_with_many_ties(form: RouterForm, dtype: torch.dtype, data: st.DataObject) -> None:
    """Few different values, so that most borders between chosen and not are ties, of experts and of groups."""
    values = st.sampled_from([0.0, 0.1, 0.2, 0.3, 1.0])
    row = st.lists(values, min_size=form.num_experts, max_size=form.num_experts)
    scores = torch.tensor(data.draw(st.lists(row, min_size=1, max_size=4)), dtype=dtype)
    bias = torch.tensor(data.draw(row), dtype=dtype) - 0.1 if form.has_bias else None
    experts = choose_experts(scores, form, bias)
    added = None if bias is None else list(bias.numpy())
    truth = [choice_in_a_loop(list(each), form, added) for each in scores.numpy()]
    assert experts.tolist() == truth and experts.dtype == torch.int64


@few
@given(router_forms(), st.integers(0, 10**6))
def test_weights_and_their_gradients(form: RouterForm, seed: int) -> None:
    logits = random(3, form.num_experts, seed=seed).requires_grad_()
    scores = probabilities(logits, form)
    experts = choose_experts(scores, form, random(form.num_experts, seed=seed + 1) if form.has_bias else None)
    weights = weights_of(scores, experts, form)
    truth = [
        weights_in_a_loop(scores_in_a_loop(each, form), chosen, form)
        for each, chosen in zip(logits.tolist(), experts.tolist(), strict=True)
    ]
    np.testing.assert_allclose(weights.detach().numpy(), truth, rtol=1e-12)
    torch.autograd.gradcheck(lambda each: weights_of(probabilities(each, form), experts, form), logits)


def test_distribution_adds_up_to_one() -> None:
    logits = random(5, 8).requires_grad_()
    for form in (SOFTMAX, SIGMOID):
        scores = probabilities(logits, form)
        distribution = expert_distribution(scores, form)
        torch.testing.assert_close(distribution.sum(-1), torch.ones(5, dtype=torch.float64))
        torch.testing.assert_close(distribution * scores.sum(-1, keepdim=True), scores)
    torch.autograd.gradcheck(lambda each: expert_distribution(probabilities(each, SIGMOID), SIGMOID), logits)


# -- rules ------------------------------------------------------------------------------------------------------------


@with_each_selection
@pytest.mark.parametrize("num_experts", [8, 16, 17, 60, 64, 128, 256, 384])
def test_equal_scores_choose_the_lowest_experts(num_experts: int) -> None:
    """`torch.topk` does not, and its order differs by row length."""
    form = RouterForm(num_experts=num_experts, top_k=6)
    assert choose_experts(torch.full((2, num_experts), 0.25), form).tolist() == [[0, 1, 2, 3, 4, 5]] * 2


@with_each_selection
def test_equal_groups_choose_the_lowest() -> None:
    scores = torch.tensor([[0.5, 0.125, 0.25, 0.375, 0.375, 0.25, 0.625, 0.0]])
    assert choose_experts(scores, GROUPED).tolist() == [[0, 3, 2]]


def test_bias_moves_the_choice_and_not_the_weights() -> None:
    logits = random(16, 8).requires_grad_()
    scores = probabilities(logits, SIGMOID)
    bias = torch.tensor([0.0] * 5 + [2.0] * 3, requires_grad=True)
    experts = choose_experts(scores, SIGMOID, bias)
    assert not experts.requires_grad and {*experts.flatten().tolist()} == {5, 6, 7}
    weights = weights_of(scores, experts, SIGMOID)
    torch.testing.assert_close(weights, scores.gather(1, experts) / scores[:, 5:].sum(1, keepdim=True))
    weights.square().sum().backward()
    assert bias.grad is None and logits.grad is not None and logits.grad[:, 5:].abs().sum() > 0


@with_each_selection
def test_a_negative_sum_of_score_and_bias_is_chosen_over_an_excluded_group() -> None:
    """Excluded groups count as negative infinity; with 0 in their place, their experts would win here."""
    form = RouterForm(num_experts=4, top_k=2, scores="sigmoid", has_bias=True, num_groups=2, group_score="top2_sum")
    scores = torch.tensor([[0.5, 0.4, 0.1, 0.1]])
    assert choose_experts(scores, form, torch.full((4,), -1.0)).tolist() == [[0, 1]]


def test_a_bias_is_given_exactly_if_the_form_has_one() -> None:
    with pytest.raises(ValueError, match="has_bias = True but the bias is missing"):
        choose_experts(torch.rand(2, 8), SIGMOID)
    with pytest.raises(ValueError, match="has_bias = False but the bias is given"):
        choose_experts(torch.rand(2, 8), SOFTMAX, torch.zeros(8))


def test_top_1_normalized_has_no_gradient() -> None:
    logits = random(4, 8).requires_grad_()
    form = RouterForm(num_experts=8, top_k=1)
    scores = probabilities(logits, form)
    weights_of(scores, choose_experts(scores, form), form).sum().backward()
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@pytest.mark.parametrize("form", [SOFTMAX, SIGMOID, GROUPED], ids=["softmax", "sigmoid", "grouped"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_scores_are_in_fp32_at_least(dtype: torch.dtype, form: RouterForm) -> None:
    logits = random(4, 8, dtype=torch.float32).to(dtype)
    scores = probabilities(logits, form)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(scores, probabilities(logits.to(scores.dtype), form))
    experts = choose_experts(scores, form, torch.zeros(8) if form.has_bias else None)
    assert weights_of(scores, experts, form).dtype == scores.dtype


@with_each_selection
@pytest.mark.parametrize("form", [SOFTMAX, SIGMOID, GROUPED], ids=["softmax", "sigmoid", "grouped"])
def test_no_token(form: RouterForm) -> None:
    logits = torch.zeros(0, 8, requires_grad=True)
    scores = probabilities(logits, form)
    experts = choose_experts(scores, form, torch.zeros(8) if form.has_bias else None)
    weights = weights_of(scores, experts, form)
    assert experts.shape == weights.shape == (0, 3)
    weights.sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 8)


# -- values that are not finite ---------------------------------------------------------------------------------------


@with_each_selection
@many
@given(router_forms(), st.data())
def test_nan_is_chosen_and_stays_visible(form: RouterForm, data: st.DataObject) -> None:
    logits = random(3, form.num_experts)
    lost = data.draw(st.sets(st.integers(0, form.num_experts - 1), min_size=1))
    logits[1, list(lost)] = math.nan
    logits.requires_grad_()
    scores = probabilities(logits, form)
    bias = random(form.num_experts) if form.has_bias else None
    experts = choose_experts(scores, form, bias)
    assert all(len(set(row)) == form.top_k and 0 <= min(row) <= max(row) < form.num_experts for row in experts.tolist())
    weights = weights_of(scores, experts, form)
    assert weights[1].isnan().any() and weights[[0, 2]].isfinite().all()
    (gradient,) = torch.autograd.grad(weights.sum(), logits)
    # The gradient of a sum of normalized weights is 0, but that of a NaN is NaN.
    assert gradient[1].isnan().any() and gradient[[0, 2]].isfinite().all()
    # The choice for other tokens is that without the NaN.
    clean = choose_experts(probabilities(random(3, form.num_experts), form), form, bias)
    assert torch.equal(experts[[0, 2]], clean[[0, 2]])


@with_each_selection
@many
@given(router_forms(), st.data())
def test_choices_are_distinct_for_any_scores_and_bias(form: RouterForm, data: st.DataObject) -> None:
    anything = st.sampled_from([0.0, 0.5, 1.0, math.nan, math.inf, -math.inf, 3e38, -3e38])
    row = st.lists(anything, min_size=form.num_experts, max_size=form.num_experts)
    scores, bias = torch.tensor([data.draw(row)]), torch.tensor(data.draw(row)) if form.has_bias else None
    (chosen,) = choose_experts(scores, form, bias).tolist()
    assert len(set(chosen)) == form.top_k
    assert len({expert // form.experts_per_group for expert in chosen}) <= form.top_groups


@with_each_selection
def test_choices_are_distinct_where_every_group_is_at_negative_infinity() -> None:
    form = RouterForm(8, 3, "sigmoid", has_bias=True, num_groups=4, top_groups=2, group_score="top2_sum")
    assert choose_experts(torch.rand(1, 8), form, torch.full((8,), -math.inf)).tolist() == [[0, 1, 2]]


def test_sigmoids_that_underflow_have_weights_of_zero() -> None:
    scores = probabilities(torch.full((1, 8), -200.0), GROUPED)
    assert weights_of(scores, choose_experts(scores, GROUPED), GROUPED).tolist() == [[0.0] * 3]
    assert expert_distribution(scores, GROUPED).tolist() == [[0.0] * 8]


# -- transformers -----------------------------------------------------------------------------------------------------

H, E, K = 32, 16, 4
SIZES = {"hidden_size": H, "num_hidden_layers": 1, "num_attention_heads": 4, "num_experts_per_tok": K}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}
FAMILIES: dict[str, tuple[str, str, dict[str, Any], RouterForm]] = {
    "mixtral": ("Mixtral", "TopKRouter", {"num_local_experts": E}, RouterForm(E, K)),
    "qwen2_moe": ("Qwen2Moe", "TopKRouter", {"num_experts": E}, RouterForm(E, K, normalizes=False)),
    "qwen2_moe_norm": ("Qwen2Moe", "TopKRouter", {"num_experts": E, "norm_topk_prob": True}, RouterForm(E, K)),
    "qwen3_moe": ("Qwen3Moe", "TopKRouter", {"num_experts": E, "norm_topk_prob": True}, RouterForm(E, K)),
    "qwen3_moe_plain": ("Qwen3Moe", "TopKRouter", {"num_experts": E}, RouterForm(E, K, normalizes=False)),
    "olmoe": ("Olmoe", "TopKRouter", {"num_experts": E}, RouterForm(E, K, normalizes=False)),
    "deepseek_v2_lite": (
        "DeepseekV2",
        "TopkRouter",
        {"n_routed_experts": E, "topk_method": "greedy", "routed_scaling_factor": 1.0},
        RouterForm(E, K, normalizes=False),
    ),
    "deepseek_v2": (
        "DeepseekV2",
        "TopkRouter",
        {"n_routed_experts": E, "topk_method": "group_limited_greedy", **GROUPS},
        RouterForm(E, K, normalizes=False, scale=2.5, num_groups=4, top_groups=2),
    ),
    "deepseek_v3": (
        "DeepseekV3",
        "TopkRouter",
        {"n_routed_experts": E, "norm_topk_prob": True, **GROUPS},
        RouterForm(E, K, "sigmoid", True, 2.5, has_bias=True, num_groups=4, top_groups=2, group_score="top2_sum"),
    ),
    "kimi_k2": (
        "DeepseekV3",
        "TopkRouter",
        {"n_routed_experts": E, "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
        RouterForm(E, K, "sigmoid", True, 2.827, has_bias=True),
    ),
    "glm4_moe": (
        "Glm4Moe",
        "TopkRouter",
        {"n_routed_experts": E, "norm_topk_prob": True, **GROUPS},
        RouterForm(E, K, "sigmoid", True, 2.5, has_bias=True, num_groups=4, top_groups=2, group_score="top2_sum"),
    ),
    "gpt_oss": ("GptOss", "TopKRouter", {"num_local_experts": E}, RouterForm(E, K)),
}


def router_of_transformers(family: str) -> tuple[nn.Module, RouterForm]:
    """Its router with random weights (and bias), and our form of it."""
    prefix, suffix, changes, form = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **changes)
    package = getattr(transformers.models, {"Olmoe": "olmoe"}.get(prefix, config.model_type))
    router = getattr(getattr(package, f"modeling_{config.model_type}"), f"{prefix}{suffix}")(config)
    nn.init.normal_(router.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    for index, name in enumerate(("e_score_correction_bias", "bias")):
        if hasattr(router, name):
            getattr(router, name).data.copy_(0.2 * random(E, seed=2 + index))
    return router, form


def dense(experts: Tensor, weights: Tensor) -> Tensor:
    """Weights by expert, `[T, E]`."""
    return torch.zeros(len(experts), E, dtype=weights.dtype).scatter(1, experts, weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_routers_of_transformers(family: str) -> None:
    """The same experts and weights in fp32 and the same gradients, of the router's weight and of its input."""
    router, form = router_of_transformers(family)
    x = random(200, H, dtype=torch.float32).requires_grad_()
    upstream = random(200, E, seed=5, dtype=torch.float32)
    _, their_weights, their_experts = router(x)
    logits = nn.functional.linear(x, router.weight, getattr(router, "bias", None))
    scores = probabilities(logits, form)
    experts = choose_experts(scores, form, router.e_score_correction_bias if form.has_bias else None)
    weights = weights_of(scores, experts, form)

    assert torch.equal(experts.sort(-1).values, their_experts.sort(-1).values)
    ours, theirs = dense(experts, weights), dense(their_experts, their_weights)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    leaves = (x, *router.parameters())
    for mine, other in zip(
        torch.autograd.grad(ours, leaves, upstream), torch.autograd.grad(theirs, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)
    # A bias and limits to groups change the choices of these tokens: the test would see them fail.
    if form.has_bias or form.has_group_limit:
        assert not torch.equal(experts, choose_experts(scores, RouterForm(E, K)))


# -- Megatron ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def megatron_routing() -> Callable[..., tuple[Tensor, Tensor]]:
    utils = pytest.importorskip("megatron.core.transformer.moe.moe_utils", exc_type=ImportError)
    routing: Callable[..., tuple[Tensor, Tensor]] = utils.topk_routing_with_score_function
    return routing


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("scores", "group_score", "has_bias"),
    [
        ("softmax", None, False),
        ("softmax", "max", False),
        ("softmax", "top2_sum", False),
        # It then chooses by logits, whose sums order groups otherwise than sums of probabilities.
        ("softmax, normalized", None, False),
        ("softmax, normalized", "max", False),
        ("sigmoid", None, False),
        ("sigmoid", "max", True),
        ("sigmoid", "top2_sum", False),
        ("sigmoid", "top2_sum", True),
    ],
)
def test_routing_of_megatron(
    megatron_routing: Callable[..., tuple[Tensor, Tensor]],
    dtype: torch.dtype,
    scores: str,
    group_score: str | None,
    has_bias: bool,
) -> None:
    """Its group score is the sum of the best topk // group_topk experts."""
    top_groups = {None: 4, "max": K, "top2_sum": K // 2}[group_score]
    function, normalizes = scores.split(",")[0], scores != "softmax"
    num_groups = 8 if group_score is not None else 4
    form = RouterForm(
        E,
        K,
        function,
        normalizes,
        2.5,
        has_bias,
        num_groups,
        top_groups,
        group_score or "max",  # type: ignore[arg-type]
    )
    logits = random(200, E, dtype=dtype).requires_grad_()
    bias = 0.2 * random(E, seed=3, dtype=dtype) if has_bias else None
    theirs, routing_map = megatron_routing(
        logits,
        topk=K,
        use_pre_softmax=not normalizes,
        num_groups=None if group_score is None else num_groups,
        group_topk=None if group_score is None else top_groups,
        scaling_factor=2.5,
        score_function=function,
        expert_bias=bias,
    )
    our_scores = probabilities(logits, form)
    experts = choose_experts(our_scores, form, bias)
    ours = dense(experts, weights_of(our_scores, experts, form))
    assert torch.equal(torch.zeros(200, E, dtype=torch.bool).scatter(1, experts, True), routing_map)
    # Its softmax is in fp32 for float64 logits, too.
    tolerance = {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(ours, theirs, **tolerance)
    upstream = random(200, E, seed=5, dtype=dtype)
    (mine,), (other,) = torch.autograd.grad(ours, logits, upstream), torch.autograd.grad(theirs, logits, upstream)
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6)


# -- compilation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", [SOFTMAX, GROUPED], ids=["softmax", "grouped"])
def test_routing_is_one_graph(form: RouterForm) -> None:
    def route(logits: Tensor) -> tuple[Tensor, Tensor]:
        scores = probabilities(logits, form)
        experts = choose_experts(scores, form)
        return experts, weights_of(scores, experts, form)

    logits = random(5, 8).requires_grad_()
    compiled = torch.compile(route, backend="aot_eager", fullgraph=True)
    for mine, truth in zip(compiled(logits), route(logits), strict=True):
        assert torch.equal(mine, truth)
