"""Activation recomputation: what a layer keeps for backward, and what it computes again there.

A policy is the names of the operators whose results are kept; everything else between them is computed again from the
layer's input. "everything" keeps what autograd saves and recomputes nothing; "nothing" keeps the input alone.

Sources: Chen et al. 2016, arXiv:1604.06174 (recomputation by layers); Korthikanti et al. 2022, arXiv:2205.05198
(recomputing only what is large and cheap). The mechanism is torch's selective activation checkpointing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

R = TypeVar("R")

Keep = Literal["everything", "matmuls", "attention", "nothing"]
"""What a layer keeps for backward, from the most memory to the most recomputation."""

KEEPS: tuple[Keep, ...] = get_args(Keep)

ATTENTION_OPS = frozenset(
    {
        "internlm::cpu_attention",
        "torch_attn::_varlen_attn",
        "flash_attn::_flash_attn_forward",
        "flash_attn::_flash_attn_varlen_forward",
        "flash_attn_3::fwd",
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
        "aten::_scaled_dot_product_fused_attention_overrideable",
    }
)
"""Operators that give attention's output, and the statistics of its softmax that its backward pass needs."""

PRODUCT_OPS = frozenset({"aten::mm", "aten::addmm", "aten::linear", "aten::_scaled_mm", "internlm::products"})
"""Operators that multiply activations with weights. Batched products are not among them: they make attention's scores,
which are much larger than its output."""

KEPT_OPS: Mapping[Keep, frozenset[str]] = {
    "nothing": frozenset(),
    "attention": ATTENTION_OPS,
    "matmuls": ATTENTION_OPS | PRODUCT_OPS,
}
"""Policy -> the operators whose results are kept, as "namespace::name"; those that are not installed do not occur."""


def recomputed(function: Callable[..., R], keep: Keep) -> Callable[..., R]:
    """`function`, with what it does not keep computed again in its backward pass.

    Without gradients it is called as it is. Results and gradients have the same bits as without recomputation, as long
    as the function draws no random numbers. The result may be compiled, and so may `function`: where both are one
    graph, the compiler follows the policy; around a compiled function, only what it keeps itself matters.

    Args:
        function: of tensors and other values; what it saves for backward is what `keep` is about. All ranks that
            exchange something in it must use the same policy.
        keep: see `Keep`.
    """
    if keep == "everything":
        return function
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if keep != "nothing":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, partial(_decide, KEPT_OPS[keep]))

    def run(*args: Any) -> R:
        if not torch.is_grad_enabled():
            return function(*args)
        if keep == "nothing" or torch.compiler.is_compiling():
            return checkpoint(function, *args, **options)
        return checkpoint(_run_selectively, function, *args, **options)

    return run


def _decide(kept: frozenset[str], _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in kept else CheckpointPolicy.PREFER_RECOMPUTE


# -- products with more around them than one operator ----------------------------------------------------------------

_is_selective: ContextVar[bool] = ContextVar("is_selective", default=False)
_computation: ContextVar[Callable[[], list[Tensor]]] = ContextVar("computation")


def as_products(compute: Callable[[], list[Tensor]], like: Tensor) -> list[Tensor]:
    """`compute()`, which is one operator where operators are told apart.

    Where products are kept, recomputation leaves out all that it does; where not, what it does besides multiplying need
    not be the same the second time (weights may have been gathered ahead).

    Args:
        compute: makes new tensors, without gradients; gathering weights for them is part of it.
        like: any tensor of the same device.
    """
    if not _is_selective.get():
        return compute()
    with _set(_computation, compute):
        return _products(like)


@torch.library.custom_op("internlm::products", mutates_args=(), schema="(Tensor like) -> Tensor[]")
def _products(like: Tensor) -> list[Tensor]:
    return _computation.get()()


def _run_selectively(function: Callable[..., R], *args: Any) -> R:
    with _set(_is_selective, True):
        return function(*args)


@contextmanager
def _set(variable: ContextVar[Any], value: Any) -> Iterator[None]:
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)
