"""Every op against its formula: forward and backward, on tensors small enough to take no time.

`internlm doctor` runs these cases on the machine at hand, `tests/cuda` with more shapes. The truth is the formula in
float64 on the same, already rounded, inputs. What an implementation in a 16-bit type may be off by follows from what
the plain formula in that type is off by: it rounds as often as any implementation, or more often. Where the result is a
number of that type, as of rounding to float8, it must be that number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from internlm.model.ops import reference
from internlm.model.ops.attention.causal_attention import VarlenMetadata, attention
from internlm.model.ops.attention.cuda_backends import BACKENDS, why_not
from internlm.model.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from internlm.model.ops.float8.linear import float8_linear
from internlm.model.ops.gated_activation import gated_activation
from internlm.model.ops.implementations import OpSettings
from internlm.model.ops.linear import linear
from internlm.model.ops.norm import layer_norm, rms_norm
from internlm.model.ops.rotary import RotaryTables, apply_rotary

LENGTHS = (37, 0, 1, 90)
"""Documents of a packed row: an empty one, one of a single token, none a multiple of a kernel's tile."""

_EPS = 1e-5


@dataclass(frozen=True)
class OpCase:
    """One op on one set of inputs.

    Attributes:
        op, name: what is compared.
        run, formula: inputs -> result or results.
        shapes: of the inputs, which are normally distributed.
        is_exact: no rounding to the dtype excuses a difference.
    """

    op: str
    name: str
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    formula: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    is_exact: bool = False


@dataclass(frozen=True)
class Outcome:
    """How a case went; `problem` is None when the op is right."""

    op: str
    name: str
    dtype: torch.dtype
    problem: str | None


def self_tests(device: torch.device, settings: OpSettings | None = None) -> Iterator[Outcome]:
    """Judge every op, and every backend of attention that can be used, on `device` in the model's dtype and in fp32.

    Float8 goes with bf16 alone, and with settings that have it.
    """
    settings = settings or OpSettings()
    for dtype in dict.fromkeys((settings.dtype, torch.float32)):
        for case in (*attention_cases(device, settings, dtype), *other_cases(device, settings)):
            yield Outcome(case.op, case.name, dtype, judge(case, device, dtype))
    if settings.use_float8:
        for case in float8_cases(device):
            yield Outcome(case.op, case.name, torch.bfloat16, judge(case, device, torch.bfloat16))


def attention_cases(
    device: torch.device,
    settings: OpSettings,
    dtype: torch.dtype,
    lengths: Sequence[int] = LENGTHS,
    heads: tuple[int, int] = (6, 2),
    windows: Sequence[int | None] = (None, 33),
) -> Iterator[OpCase]:
    """Packed documents and rows, with and without a window, by every backend that can be used.

    Args:
        heads: query heads and key-value heads.
    """
    backends = ["auto"]
    if device.type == "cuda":
        needs = OpSettings(dtype, settings.head_dim).attention_needs(device)
        backends += [backend.name for backend in BACKENDS if why_not(backend, needs) is None]
    varlen = VarlenMetadata.of(tuple(lengths))
    varlen = VarlenMetadata(varlen.cu_seqlens.to(device), varlen.lengths, varlen.max_seqlen)
    length = max(lengths)
    for backend in backends:
        for window in windows:
            run = partial(
                attention,
                window=window,
                attention_backend=backend,
                use_flash_attn=settings.use_flash_attn or backend != "auto",
            )
            formula = partial(reference.attention, window=window)
            suffix = f"{'' if window is None else f', window of {window}'}, {backend}"
            packed, rows = (
                tuple((*size, number, settings.head_dim) for number in (heads[0], heads[1], heads[1]))
                for size in ((1, sum(lengths)), (2, length))
            )
            yield OpCase(
                "attention",
                f"packed documents{suffix}",
                partial(run, varlen=varlen),
                partial(formula, cu_seqlens=varlen.cu_seqlens),
                packed,
            )
            yield OpCase("attention", f"rows{suffix}", run, formula, rows)


def other_cases(
    device: torch.device, settings: OpSettings, tokens: tuple[int, int] = (2, 13), width: int = 50
) -> Iterator[OpCase]:
    """All other ops on `[*tokens, width]`."""
    kernels = settings.fused_kernels
    for unit_offset in (False, True):
        yield OpCase(
            "rms_norm",
            "1 + weight" if unit_offset else "weight",
            partial(rms_norm, eps=_EPS, unit_offset=unit_offset, fused_kernels=kernels),
            partial(reference.rms_norm, eps=_EPS, unit_offset=unit_offset),
            ((*tokens, width), (width,)),
        )
    yield OpCase(
        "layer_norm",
        "weight and bias",
        partial(layer_norm, eps=_EPS),
        partial(reference.layer_norm, eps=_EPS),
        ((*tokens, width), (width,), (width,)),
    )
    for activation in cast(tuple[Literal["silu", "gelu_tanh"], ...], ("silu", "gelu_tanh")):
        formula = partial(reference.gated_activation, activation=activation)
        yield OpCase(
            "gated_activation",
            activation,
            partial(gated_activation, activation=activation, fused_kernels=kernels),
            formula,
            ((*tokens, width), (*tokens, width)),
        )
    yield from _linear_cases(tokens, width)
    yield from _rotary_cases(device, settings.head_dim, tokens)
    # Logits grow with the width, and fp16 ends at 65,504.
    yield from _loss_cases(device, min(width, 64))


def _linear_cases(tokens: tuple[int, int], width: int) -> Iterator[OpCase]:
    # On a CPU the weight gradient of wide layers is computed in one of two ways, that of others in a third.
    for name, shape in (("narrow", (width, 30)), ("wider than its input", (1030, width)), ("narrower", (width, 1030))):
        formula = torch.nn.functional.linear
        yield OpCase("linear", name, linear, formula, ((*tokens, shape[1]), shape, shape[:1]))


def float8_cases(device: torch.device, tokens: int = 48, inputs: int = 64, outputs: int = 32) -> Iterator[OpCase]:
    """The three products of a linear layer in float8, of numbers rounded by their definition; and the rounding alone.

    Args:
        tokens, inputs, outputs: multiples of `float8.MULTIPLE`.
    """
    yield OpCase(
        "float8_linear", "products", float8_linear, reference.float8_linear, ((2, tokens, inputs), (outputs, inputs))
    )
    # A product with ones on the diagonal is the other operand, rounded; and so are the gradients.
    ones = torch.eye(inputs, device=device)
    # From the largest number of the formats, e4m3 with 18 powers of two and e5m2 with 32, to what is rounded to zero.
    sizes = torch.exp2(-(torch.arange(inputs, device=device) % 36).float())

    def both(linear: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        one, size = ones.to(x.dtype), sizes.to(x.dtype)
        return linear(x * size, one) * size, linear(one, weight * size) * size.unsqueeze(-1)

    yield OpCase(
        "float8_linear",
        "rounding of inputs, weights and gradients",
        partial(both, float8_linear),
        partial(both, reference.float8_linear),
        ((2, tokens, inputs), (outputs, inputs)),
        is_exact=True,
    )


def _rotary_cases(device: torch.device, head_dim: int, tokens: tuple[int, int]) -> Iterator[OpCase]:
    generator = torch.Generator().manual_seed(0)
    # The angles of a model are exact in fp32, and so they are here: they are no source of errors.
    angles = torch.randn(*tokens, head_dim // 2, generator=generator).to(device)
    for interleaved in (False, True):
        tables = RotaryTables.of(angles, interleaved, torch.float32)
        turn = partial(reference.rotary, angles=angles, interleaved=interleaved)
        layout = "interleaved" if interleaved else "halves"
        yield OpCase("rotary", layout, partial(apply_rotary, tables=tables), turn, ((*tokens, 3, head_dim),))


def _loss_cases(device: torch.device, width: int, tokens: int = 37, vocab: int = 101) -> Iterator[OpCase]:
    labels = torch.randint(vocab, (tokens,), generator=torch.Generator().manual_seed(0))
    labels[:: tokens // 4 + 1] = IGNORE_INDEX
    labels = labels.to(device)
    for smoothing, z_loss in ((0.0, 0.0), (0.1, 1e-2)):

        def run(hidden: Tensor, weight: Tensor, smoothing: float = smoothing, z_loss: float = z_loss) -> Tensor:
            return linear_cross_entropy(
                hidden, weight, labels, label_smoothing=smoothing, z_loss_coeff=z_loss, chunk_tokens=16
            ).loss_sum

        yield OpCase(
            "linear_cross_entropy",
            "label smoothing and z-loss" if smoothing else "plain",
            run,
            partial(reference.linear_cross_entropy, labels=labels, label_smoothing=smoothing, z_loss_coeff=z_loss),
            ((tokens, width), (vocab, width)),
        )


def judge(case: OpCase, device: torch.device, dtype: torch.dtype, seed: int = 0) -> str | None:
    """None when results and gradients are right within the rounding of `dtype`; else what is wrong, also when the op
    raises."""
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in case.shapes]
    exact = _results(case.formula, [x.double() for x in inputs], dtype, seed)
    plain = _results(case.formula, inputs, dtype, seed)
    try:
        ours = _results(case.run, inputs, dtype, seed)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if len(ours) != len(exact):
        return f"{len(ours)} results and gradients instead of {len(exact)}"
    num_results = len(exact) - len(inputs)
    for number, (mine, truth, rough) in enumerate(zip(ours, exact, plain, strict=True)):
        what = "the result" if number < num_results else f"the gradient of input {number - num_results + 1}"
        if mine.shape != truth.shape:
            return f"{what} is {list(mine.shape)} instead of {list(truth.shape)}"
        distance = _relative_error(mine, truth)
        allowed = 0.0 if case.is_exact else 4 * _relative_error(rough, truth) + torch.finfo(dtype).eps
        # Not `distance > allowed`: NaN is an error too.
        if not distance <= allowed:
            return f"{what} is off by {distance:.1e} of its size; rounding explains {allowed:.1e}"
    return None


def _results(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: Sequence[Tensor], dtype: torch.dtype, seed: int
) -> list[Tensor]:
    """Results and gradients of all inputs, for one random gradient of the results, of the values of `dtype`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    results = (out,) if isinstance(out, Tensor) else out
    generator = torch.Generator().manual_seed(seed + 1)
    grads = []
    for result in results:
        # The gradient of a loss is a whole number, as good in any dtype.
        grad = torch.randn(result.shape, generator=generator).to(dtype) if result.dim() else torch.ones(())
        grads.append(grad.to(result.device, result.dtype))
    return [*(result.detach() for result in results), *torch.autograd.grad(results, leaves, grads)]


def _relative_error(value: Tensor, truth: Tensor) -> float:
    """The error's size over that of the truth. Where the truth is zero (the gradient of queries that see a single key),
    over four a number: all inputs are of size one, and zero comes of a difference of two terms that are rounded."""
    one_a_number = max(truth.numel(), 1) ** 0.5
    size = truth.norm().item()
    return (value.double() - truth).norm().item() / (size if size > 1e-9 * one_a_number else 4 * one_a_number)
