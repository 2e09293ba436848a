"""Compares every op with its reference implementation, forward and backward, on small tensors.

`internlm doctor` runs these cases on the current machine, `tests/cuda` with more shapes. The ground truth is the
reference in float64 on the same, already rounded, inputs. The tolerance of an implementation in a 16-bit dtype follows
from the error of the reference in that dtype, which rounds at least as often. If the result is exactly representable,
such as a rounding to float8, it must be exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, cast

import torch
from torch import Tensor

from internlm.model.ops import reference
from internlm.model.ops.attention.attention_in_parts import attention_in_parts
from internlm.model.ops.attention.causal_attention import VarlenMetadata, attention
from internlm.model.ops.attention.cuda_backends import BACKENDS, why_not
from internlm.model.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from internlm.model.ops.float8.grouped_linear import float8_grouped_linear
from internlm.model.ops.float8.linear import float8_linear
from internlm.model.ops.gated_activation import gated_activation
from internlm.model.ops.grouped_linear import grouped_linear
from internlm.model.ops.implementations import OpSettings
from internlm.model.ops.linear import linear
from internlm.model.ops.norm import layer_norm, rms_norm
from internlm.model.ops.packed_projections import unpack_gate_up, unpack_query_key_value
from internlm.model.ops.rotary import RotaryTables, apply_rotary

LENGTHS = (37, 0, 1, 90)
"""Lengths of the documents of a packed row: one is 0, one is 1, none is a multiple of a kernel's tile."""

_EPS = 1e-5


@dataclass(frozen=True)
class OpCase:
    """One op on one set of inputs.

    Attributes:
        op, name: the op and a description of the case.
        run, formula: implementation and reference: inputs -> result or results.
        shapes: of the inputs, which are normally distributed.
        is_exact: the results must be equal.
        has_grad: gradients are compared too; otherwise the op runs as in generation.
    """

    op: str
    name: str
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    formula: Callable[..., Tensor | tuple[Tensor, ...]]
    shapes: tuple[tuple[int, ...], ...]
    is_exact: bool = False
    has_grad: bool = True


@dataclass(frozen=True)
class Outcome:
    """The outcome of a case; `problem` is None if the op is correct."""

    op: str
    name: str
    dtype: torch.dtype
    problem: str | None


def self_tests(device: torch.device, settings: OpSettings | None = None) -> Iterator[Outcome]:
    """Test every op, and every usable attention backend, on `device` in the model's dtype and in fp32.

    The float8 ops are tested in bf16 only, and only if the settings use them.
    """
    settings = settings or OpSettings()
    for dtype in dict.fromkeys((settings.dtype, torch.float32)):
        attentions = (*attention_cases(device, settings, dtype), *partial_attention_cases(device, settings))
        for case in (*attentions, *other_cases(device, settings)):
            yield Outcome(case.op, case.name, dtype, judge(case, device, dtype))
    if settings.use_float8:
        for case in (*float8_cases(device), *float8_grouped_cases(device)):
            yield Outcome(case.op, case.name, torch.bfloat16, judge(case, device, torch.bfloat16))


def attention_cases(
    device: torch.device,
    settings: OpSettings,
    dtype: torch.dtype,
    lengths: Sequence[int] = LENGTHS,
    heads: tuple[int, int] = (6, 2),
    windows: Sequence[int | None] = (None, 33),
    leave_out: Sequence[str] = (),
) -> Iterator[OpCase]:
    """Packed documents and rows of equal length, with and without a window, for every usable backend.

    Flex attention is compiled for every case, which takes seconds; it gets no rows, which it sees as documents.

    Args:
        device: of the tensors.
        settings: head dimension and kernels.
        dtype: of queries, keys and values.
        lengths: of the documents.
        heads: numbers of query heads and key-value heads.
        windows: see `attention`.
        leave_out: names of backends.
    """
    backends = ["auto"]
    if device.type == "cuda":
        needs = OpSettings(dtype, settings.head_dim).attention_needs(device)
        backends += [backend.name for backend in BACKENDS if why_not(backend, needs) is None]
    backends = [name for name in backends if name not in leave_out]
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
            if backend != "flex":
                yield OpCase("attention", f"rows{suffix}", run, formula, rows)


def partial_attention_cases(
    device: torch.device,
    settings: OpSettings,
    lengths: Sequence[int] = LENGTHS,
    heads: tuple[int, int] = (6, 2),
    windows: Sequence[int | None] = (None, 33),
    num_parts: int = 3,
) -> Iterator[OpCase]:
    """Packed documents, whose keys are seen in parts; arguments as of `attention_cases`."""
    bounds = VarlenMetadata.of(tuple(lengths)).cu_seqlens.to(device)
    for window in windows:
        yield OpCase(
            "partial_attention",
            f"packed documents{'' if window is None else f', window of {window}'}, keys in {num_parts} parts",
            partial(attention_in_parts, lengths=lengths, num_parts=num_parts, window=window),
            partial(reference.attention, cu_seqlens=bounds, window=window),
            tuple((1, sum(lengths), number, settings.head_dim) for number in (heads[0], heads[1], heads[1])),
        )


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
    yield from _grouped_linear_cases(device)
    yield from _packed_cases(tokens, width)
    yield from _rotary_cases(device, settings.head_dim, tokens)
    # Logits grow with the width, and the largest fp16 number is 65,504.
    yield from _loss_cases(device, min(width, 64))


def _linear_cases(tokens: tuple[int, int], width: int) -> Iterator[OpCase]:
    # On a CPU, the weight gradient of wide layers is computed in one of two ways, that of other layers in a third.
    for name, shape in (("narrow", (width, 30)), ("wider than its input", (1030, width)), ("narrower", (width, 1030))):
        formula = torch.nn.functional.linear
        yield OpCase("linear", name, linear, formula, ((*tokens, shape[1]), shape, shape[:1]))
    for rows in (1, 7, 16):
        shapes = ((rows, 1, width), (70, width), (70,))
        yield OpCase("linear", f"{rows} rows in generation", linear, torch.nn.functional.linear, shapes, has_grad=False)


def _grouped_linear_cases(device: torch.device) -> Iterator[OpCase]:
    # Widths of 52 and 70 have rows that are not multiples of 16 bytes in a 16-bit dtype, which a loop computes.
    for name, counts, widths in (
        ("experts of all sizes", (37, 0, 1, 90, 0), (48, 64)),
        ("widths not a multiple of 8", (37, 0, 1, 90, 0), (52, 70)),
        ("one expert with all rows", (0, 64, 0), (48, 64)),
        ("no rows", (0, 0), (48, 64)),
    ):
        own = torch.tensor(counts, device=device)
        yield OpCase(
            "grouped_linear",
            name,
            partial(grouped_linear, counts=own),
            partial(reference.grouped_linear, counts=own),
            ((sum(counts), widths[0]), (len(counts), widths[1], widths[0])),
        )


def _packed_cases(tokens: tuple[int, int], width: int, group_size: int = 3, kv_heads: int = 2) -> Iterator[OpCase]:
    def slices(packed: Tensor) -> tuple[Tensor, ...]:
        groups = packed.unflatten(-1, (kv_heads, group_size + 2, -1))
        parts = (groups[..., :group_size, :], groups[..., group_size, :], groups[..., group_size + 1, :])
        return tuple(part.flatten(2) for part in parts)

    head_dim = 4
    yield OpCase(
        "linear",
        "packed queries, keys and values",
        partial(unpack_query_key_value, group_size=group_size, head_dim=head_dim),
        slices,
        ((*tokens, kv_heads * (group_size + 2) * head_dim),),
        is_exact=True,
    )
    yield OpCase(
        "linear",
        "packed gate and up",
        unpack_gate_up,
        lambda packed: (packed[..., :width], packed[..., width:]),
        ((*tokens, 2 * width),),
        is_exact=True,
    )


def float8_cases(device: torch.device, tokens: int = 48, inputs: int = 64, outputs: int = 32) -> Iterator[OpCase]:
    """The three GEMMs of a float8 linear layer, with operands rounded by definition; and the rounding alone.

    Args:
        device: of the tensors.
        tokens, inputs, outputs: multiples of `float8.MULTIPLE`.
    """
    yield OpCase(
        "float8_linear", "GEMMs", float8_linear, reference.float8_linear, ((2, tokens, inputs), (outputs, inputs))
    )
    # A GEMM with the identity returns the other operand, rounded; so do the gradients.
    ones = torch.eye(inputs, device=device)
    # From the largest number to those that round to zero: e4m3 spans 18 powers of two, e5m2 32.
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


def float8_grouped_cases(
    device: torch.device,
    counts: Sequence[int] = (37, 0, 1, 90, 0),
    inputs: int = 48,
    outputs: int = 64,
    linear: Callable[..., Tensor] = float8_grouped_linear,
) -> Iterator[OpCase]:
    """The three GEMMs of the experts of a layer in float8, with operands rounded by definition; and the rounding alone.

    Args:
        device: of the tensors.
        counts: rows of each expert.
        inputs, outputs: multiples of `float8.MULTIPLE`.
        linear: what is tested.
    """
    for name, own_counts in (
        ("experts of all sizes", counts),
        ("one expert with all rows", (0, 64, 0)),
        ("no rows", (0, 0)),
    ):
        own = torch.tensor(own_counts, device=device)
        yield OpCase(
            "float8_grouped_linear",
            name,
            partial(linear, counts=own),
            partial(reference.float8_grouped_linear, counts=own),
            ((sum(own_counts), inputs), (len(own_counts), outputs, inputs)),
        )
    # GEMMs with the identity, as in `float8_cases`; each expert has as many rows as inputs.
    experts = torch.full((3,), inputs, device=device)
    ones = torch.eye(inputs, device=device)
    sizes = torch.exp2(-(torch.arange(inputs, device=device) % 36).float())

    def both(grouped: Callable[[Tensor, Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        one, size = ones.to(x.dtype), sizes.to(x.dtype)
        # Rows and experts of different sizes have different scales.
        rows, matrices = x * size * size.repeat(3).unsqueeze(-1), weight * size * size[:3].view(-1, 1, 1)
        return (
            grouped(rows, one.repeat(3, 1, 1), experts) * size,
            grouped(one.repeat(3, 1), matrices, experts) * size.repeat(3).unsqueeze(-1),
        )

    yield OpCase(
        "float8_grouped_linear",
        "rounding of rows, weights and gradients",
        partial(both, linear),
        partial(both, reference.float8_grouped_linear),
        ((3 * inputs, inputs), (3, outputs, inputs)),
        is_exact=True,
    )


def _rotary_cases(device: torch.device, head_dim: int, tokens: tuple[int, int]) -> Iterator[OpCase]:
    generator = torch.Generator().manual_seed(0)
    # The angles are in fp32 in every case, as in a model, so they cause no error.
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
    """The problem of a case, including an exception of the op; None if results and gradients are within tolerance.

    Args:
        case: what to compare.
        device: of the tensors.
        dtype: of the inputs.
        seed: of the random inputs and output gradients.
    """
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype) for shape in case.shapes]
    exact = _results(case.formula, [x.double() for x in inputs], dtype, seed, case.has_grad)
    plain = _results(case.formula, inputs, dtype, seed, case.has_grad)
    try:
        ours = _results(case.run, inputs, dtype, seed, case.has_grad)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
    if len(ours) != len(exact):
        return f"{len(ours)} results and gradients instead of {len(exact)}"
    num_results = len(exact) - len(inputs) if case.has_grad else len(exact)
    for number, (value, truth, rounded) in enumerate(zip(ours, exact, plain, strict=True)):
        what = "the result" if number < num_results else f"the gradient of input {number - num_results + 1}"
        if value.shape != truth.shape:
            return f"{what} has shape {list(value.shape)} instead of {list(truth.shape)}"
        deviation = _relative_error(value, truth)
        tolerance = 0.0 if case.is_exact else 4 * _relative_error(rounded, truth) + torch.finfo(dtype).eps
        # Not `deviation > tolerance`: NaN is an error too.
        if not deviation <= tolerance:
            return f"{what} has a relative error of {deviation:.1e}, above the tolerance of {tolerance:.1e}"
    return None


def _results(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    seed: int,
    has_grad: bool,
) -> list[Tensor]:
    """Results, and gradients of all inputs for a random gradient of the results, rounded to `dtype`."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    with torch.inference_mode(not has_grad):
        out = function(*leaves)
    results = (out,) if isinstance(out, Tensor) else out
    if not has_grad:
        return list(results)
    generator = torch.Generator().manual_seed(seed + 1)
    grads = []
    for result in results:
        # The gradient of a scalar is 1, which is exact in any dtype.
        grad = torch.randn(result.shape, generator=generator).to(dtype) if result.dim() else torch.ones(())
        grads.append(grad.to(result.device, result.dtype))
    return [*(result.detach() for result in results), *torch.autograd.grad(results, leaves, grads)]


def _relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the error, relative to the norm of the truth.

    If the truth is zero (the gradient of queries that attend to a single key), relative to 4 per element: inputs are of
    order one, and zero is the difference of two rounded terms.
    """
    norm_of_ones = max(truth.numel(), 1) ** 0.5
    norm = truth.norm().item()
    return (value.double() - truth).norm().item() / (norm if norm > 1e-9 * norm_of_ones else 4 * norm_of_ones)
