"""The fused loss against a head and torch.nn.functional.cross_entropy, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from internlm.model.ops import cross_entropy as cross_entropy_module
from internlm.model.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy

TOKENS, HIDDEN, VOCAB = 23, 5, 31


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(VOCAB, (TOKENS,), generator=generator)
    labels[[0, 4, 5, 22]] = IGNORE_INDEX
    labels[1] = 0
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def _reference(hidden: Tensor, weight: Tensor, labels: Tensor, smoothing: float, z: float) -> Tensor:
    logits = hidden @ weight.t()
    loss = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    return loss + z * logits.logsumexp(-1)[labels != IGNORE_INDEX].square().sum()


@pytest.fixture(params=[1, 10 * VOCAB, 1 << 19], ids=["row", "ten-rows", "whole"], autouse=True)
def cache_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy_module, "_CACHE_ELEMENTS", request.param)


@pytest.mark.parametrize("z", [0.0, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_loss_and_gradients(chunk: int, smoothing: float, z: float) -> None:
    hidden, weight, labels = _inputs()
    out = linear_cross_entropy(
        hidden, weight, labels, label_smoothing=smoothing, z_loss_coeff=z, chunk_tokens=chunk, with_accuracy=True
    )
    expected = _reference(hidden, weight, labels, smoothing, z)
    torch.testing.assert_close(out.loss_sum, expected)
    # The factor stands for the loss scale and the division by the number of tokens.
    torch.testing.assert_close(
        torch.autograd.grad(3.5 * out.loss_sum, (hidden, weight)), torch.autograd.grad(3.5 * expected, (hidden, weight))
    )
    logits = hidden @ weight.t()
    torch.testing.assert_close(out.token_losses, F.cross_entropy(logits, labels, reduction="none"))
    assert not out.token_losses.requires_grad
    assert out.correct is not None and torch.equal(out.correct, logits.argmax(-1) == labels)


def test_gradcheck() -> None:
    hidden, weight, labels = _inputs()

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(
            hidden, weight, labels, label_smoothing=0.2, z_loss_coeff=0.1, chunk_tokens=10
        ).loss_sum

    assert torch.autograd.gradcheck(loss, (hidden, weight))
    assert torch.autograd.gradcheck(lambda h: loss(h, weight.detach()), hidden)
    assert torch.autograd.gradcheck(lambda w: loss(hidden.detach(), w), weight)


@pytest.mark.parametrize("tokens", [0, 6])
def test_no_valid_token(tokens: int) -> None:
    """Zero and zero gradients, never NaN, even where the logits are infinite."""
    hidden, weight, _ = _inputs()
    hidden = hidden[:tokens].detach().clone()
    if tokens:
        hidden[2] = math.inf
    hidden.requires_grad_()
    labels = torch.full((tokens,), IGNORE_INDEX)
    out = linear_cross_entropy(hidden, weight, labels, label_smoothing=0.1, z_loss_coeff=0.1, with_accuracy=True)
    assert out.loss_sum.item() == 0 and not out.token_losses.any() and not out.correct.any()
    (grad_hidden,) = torch.autograd.grad(out.loss_sum, hidden, retain_graph=True)
    assert torch.equal(grad_hidden, torch.zeros_like(hidden))
    if not tokens:
        (grad_weight,) = torch.autograd.grad(out.loss_sum, weight)
        assert torch.equal(grad_weight, torch.zeros_like(weight))


def test_without_gradient() -> None:
    hidden, weight, labels = _inputs()
    with torch.no_grad():
        out = linear_cross_entropy(hidden, weight, labels)
    assert not out.loss_sum.requires_grad and out.correct is None
    torch.testing.assert_close(out.loss_sum, _reference(hidden, weight, labels, 0, 0).detach())


@pytest.mark.parametrize("z", [0.0, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_capped_logits(smoothing: float, z: float) -> None:
    hidden, weight, labels = _inputs()
    out = linear_cross_entropy(hidden, weight, labels, label_smoothing=smoothing, z_loss_coeff=z, softcap=1.5)
    logits = 1.5 * torch.tanh(hidden @ weight.t() / 1.5)
    expected = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
    expected = expected + z * logits.logsumexp(-1)[labels != IGNORE_INDEX].square().sum()
    torch.testing.assert_close(out.loss_sum, expected)
    found = torch.autograd.grad(out.loss_sum, (hidden, weight))
    for mine, theirs in zip(found, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        torch.testing.assert_close(mine, theirs)


def test_first_of_equal_logits_counts() -> None:
    weight = torch.zeros(VOCAB, HIDDEN)
    labels = torch.tensor([0, 3, IGNORE_INDEX])
    out = linear_cross_entropy(torch.ones(3, HIDDEN), weight, labels, with_accuracy=True)
    assert out.correct.tolist() == [True, False, False]


def test_bf16() -> None:
    """Logits are rounded to 8 bits: one of size 8 moves by up to 2^-6, the mean over tokens far less."""
    hidden, weight, labels = _inputs(torch.bfloat16)
    out = linear_cross_entropy(hidden, weight, labels)
    assert out.loss_sum.dtype == torch.float32
    exact_hidden, exact_weight = (x.detach().double().requires_grad_() for x in (hidden, weight))
    exact = _reference(exact_hidden, exact_weight, labels, 0, 0)
    torch.testing.assert_close(out.loss_sum.double(), exact, rtol=2**-9, atol=0)
    grads = torch.autograd.grad(out.loss_sum, (hidden, weight))
    for mine, reference in zip(grads, torch.autograd.grad(exact, (exact_hidden, exact_weight)), strict=True):
        assert mine.dtype == torch.bfloat16
        assert (mine.double() - reference).norm() < 4 * 2**-9 * reference.norm()


class _LargestTensor(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return out


def test_whole_logits_never_exist() -> None:
    hidden, weight, labels = _inputs()
    with _LargestTensor() as largest:
        linear_cross_entropy(hidden, weight, labels, chunk_tokens=4).loss_sum.backward()
    assert largest.elements <= max(4 * VOCAB, VOCAB * HIDDEN)


def test_the_factor_of_the_loss_is_not_rounded_to_bf16() -> None:
    """1 / number of tokens is no bf16 number; every gradient takes it in fp32, so that none is scaled apart."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(5, 16, generator=generator).bfloat16()
    weight = torch.randn(11, 16, generator=generator).bfloat16()
    labels = torch.tensor([1, 4, IGNORE_INDEX, 0, 10])
    factor = torch.tensor(1 / 3)
    unit, scaled = [], []
    for grads, scale in ((unit, torch.tensor(1.0)), (scaled, factor)):
        leaves = (hidden.clone().requires_grad_(), weight.clone().requires_grad_())
        (linear_cross_entropy(*leaves, labels).loss_sum * scale).backward()
        grads.extend(leaf.grad for leaf in leaves)
    assert torch.equal(scaled[0], (unit[0].float() * factor).bfloat16())
    # The head's gradient is summed in fp32 and rounded once: at most one rounding apart from the rounded unit one.
    torch.testing.assert_close(scaled[1].float(), unit[1].float() * factor, rtol=2**-7, atol=0)


@pytest.mark.parametrize("z", [0.0, 0.3])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_what_is_compiled_for_gpus_gives_the_same(smoothing: float, z: float) -> None:
    """The written-out forms, on logits with many equal scores, of which the first counts as predicted."""
    generator = torch.Generator().manual_seed(3)
    logits = torch.randint(-3, 4, (TOKENS, VOCAB), generator=generator).double()
    labels = logits.argmax(-1)
    labels[::3] = torch.randint(VOCAB, labels[::3].shape, generator=generator)
    labels[4] = IGNORE_INDEX
    logits[7] = torch.inf
    labels[7] = IGNORE_INDEX
    results = []
    for function in (
        cross_entropy_module._rows_loss,
        torch.compile(cross_entropy_module._rows_loss, backend="aot_eager", fullgraph=True),
    ):
        gradient, correct = logits.clone(), torch.empty(TOKENS, dtype=torch.bool)
        losses = function(gradient, labels, smoothing, z, None, True, correct, None)
        results.append((*losses, gradient, correct))
    torch.testing.assert_close(results[1], results[0])
    assert 0 < int(results[0][-1].sum()) < TOKENS - 2
