"""Activation recomputation: what a layer saves for backward, and what it recomputes.

A save policy names the operators whose results are saved; everything else is recomputed in backward from the layer's
input. "everything" saves what autograd saves and recomputes nothing; "nothing" saves only the input.

Sources: Chen et al. 2016, arXiv:1604.06174 (recomputation by layer); Korthikanti et al. 2022, arXiv:2205.05198
(selective recomputation). The mechanism is torch's selective activation checkpointing.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal, Protocol, TypeVar, get_args

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

R = TypeVar("R")

SavePolicy = Literal["everything", "matmuls", "attention", "nothing"]
"""What a layer saves for backward, from the most memory to the most recomputation."""

SAVE_POLICIES: tuple[SavePolicy, ...] = get_args(SavePolicy)

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
"""Operators that return attention's output and the softmax statistics that its backward pass needs."""

GEMM_OPS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::linear",
        "aten::_scaled_mm",
        "internlm::gemms",
        "internlm::fp32_gemm",
        "internlm::grouped_linear",
    }
)
"""GEMMs of activations with weights. Batched GEMMs are excluded: they compute attention's scores, which are much larger
than its output."""

ALWAYS_SAVED_OPS = frozenset({"internlm::routing", "internlm::choose_experts", "internlm::attention"})
"""Operators whose results every policy saves: recomputed on rounded inputs, a choice of experts could be another, and
attention over several ranks would exchange all keys and values again."""

SAVED_OPS: Mapping[SavePolicy, frozenset[str]] = {
    "nothing": ALWAYS_SAVED_OPS,
    "attention": ALWAYS_SAVED_OPS | ATTENTION_OPS,
    "matmuls": ALWAYS_SAVED_OPS | ATTENTION_OPS | GEMM_OPS,
}
"""Save policy -> operators whose results are saved, as "namespace::name"; some may not be installed."""


class TensorStore(Protocol):
    """Holds saved results between forward and backward."""

    def put(self, tensor: Tensor) -> Any:
        """Store a tensor; returns the handle for `get`."""

    def get(self, stored: Any) -> Tensor:
        """The tensor of a handle; called once per handle."""


def recomputed(
    function: Callable[..., R],
    save_policy: SavePolicy,
    store: TensorStore | None = None,
    *,
    has_saved_operators: bool = False,
) -> Callable[..., R]:
    """Wrap `function` so that backward recomputes what the save policy does not save.

    Without gradients, `function` is called directly. Results and gradients are bit-equal to those without recomputation
    as long as the function draws no random numbers. The wrapper may be compiled together with `function`, and the
    compiler follows the policy; around a compiled function, the policy sees only the operators that were not fused.

    Args:
        function: takes tensors and other values. All ranks that communicate in it must use the same policy.
        save_policy: see `SavePolicy`.
        store: holds the saved results; None: they stay on the device. Not for compiled graphs.
        has_saved_operators: `function` calls operators of `ALWAYS_SAVED_OPS`.
    """
    if save_policy == "everything":
        return function
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    is_selective = save_policy != "nothing" or has_saved_operators
    if is_selective:
        options["context_fn"] = (
            partial(create_selective_checkpoint_contexts, partial(_decide, SAVED_OPS[save_policy]))
            if store is None
            else partial(_stored_contexts, SAVED_OPS[save_policy], store)
        )

    def run(*args: Any) -> R:
        if not torch.is_grad_enabled():
            return function(*args)
        if not is_selective or torch.compiler.is_compiling():
            return checkpoint(function, *args, **options)
        return checkpoint(_run_selectively, function, *args, **options)

    return run


def _decide(saved: frozenset[str], _: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in saved else CheckpointPolicy.PREFER_RECOMPUTE


# -- saved in a store -------------------------------------------------------------------------------------------------


def _stored_contexts(saved: frozenset[str], store: TensorStore) -> tuple[TorchDispatchMode, TorchDispatchMode]:
    """Like torch's contexts for selective checkpointing, but with a store."""
    results: dict[str, deque[Any]] = defaultdict(deque)
    return _Store(saved, store, results), _Replay(saved, store, results)


class _Stored:
    """Wrapper of the store's handle, to distinguish it from other leaves of a result."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Store(TorchDispatchMode):
    """Stores the results of the saved operators, by operator in call order."""

    def __init__(self, saved: frozenset[str], store: TensorStore, results: dict[str, deque[Any]]) -> None:
        super().__init__()
        self._saved, self._store, self._results = saved, store, results

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name() in self._saved:
            # Detached: autograd records the caller's tensor, and the stored one must not be part of that graph.
            stored = tree_map_only(Tensor, lambda tensor: _Stored(self._store.put(tensor.detach())), result)
            self._results[func.name()].append(stored)
        return result


class _Replay(_Store):
    """Returns the stored results instead of running the operators."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name() not in self._saved:
            return func(*args, **(kwargs or {}))
        result = self._results[func.name()].popleft()
        return tree_map_only(_Stored, lambda stored: self._store.get(stored.value), result)


# -- groups of operations as one operator ---------------------------------------------------------------------------

_is_selective: ContextVar[bool] = ContextVar("is_selective", default=False)
_computation: ContextVar[Callable[[], list[Tensor]]] = ContextVar("computation")


def as_gemm_operator(compute: Callable[[], list[Tensor]], like: Tensor) -> list[Tensor]:
    """`compute()`, as one operator in selective recomputation, which a policy that saves GEMMs saves.

    If its results are saved, recomputation skips it as a unit. If not, its other operations, such as gathers, may
    differ the second time, because weights may have been prefetched.

    Args:
        compute: runs GEMMs without autograd and returns new tensors; it may gather the weights for them.
        like: any tensor on the same device.
    """
    return _as_operator(_gemms, compute, like)


def as_attention_operator(compute: Callable[[], list[Tensor]], like: Tensor) -> list[Tensor]:
    """`compute()`, as one operator that every policy saves, so that keys and values travel once.

    Args:
        compute: attention over several ranks, without autograd; returns its output and its log-sum-exp.
        like: any tensor on the same device.
    """
    return _as_operator(_attention, compute, like)


def as_recomputed_operator(compute: Callable[[], list[Tensor]], like: Tensor) -> list[Tensor]:
    """`compute()`, as one operator that no policy saves, so that its operations may differ in recomputation.

    torch counts operators by name, and refuses a recomputation that runs others than the first time.

    Args:
        compute, like: see `as_gemm_operator`.
    """
    return _as_operator(_recomputed, compute, like)


def as_routing_operator(compute: Callable[[], list[Tensor]], like: Tensor) -> list[Tensor]:
    """`compute()`, as one operator that every policy saves, so that it runs once.

    Args:
        compute: chooses experts without autograd and returns new tensors.
        like: any tensor on the same device.
    """
    return _as_operator(_routing, compute, like)


def _as_operator(operator: Any, compute: Callable[[], list[Tensor]], like: Tensor) -> list[Tensor]:
    if not _is_selective.get():
        return compute()
    with _set(_computation, compute):
        result: list[Tensor] = operator(like)
    return result


@torch.library.custom_op("internlm::gemms", mutates_args=(), schema="(Tensor like) -> Tensor[]")
def _gemms(like: Tensor) -> list[Tensor]:
    return _computation.get()()


@torch.library.custom_op("internlm::attention", mutates_args=(), schema="(Tensor like) -> Tensor[]")
def _attention(like: Tensor) -> list[Tensor]:
    return _computation.get()()


@torch.library.custom_op("internlm::recomputed", mutates_args=(), schema="(Tensor like) -> Tensor[]")
def _recomputed(like: Tensor) -> list[Tensor]:
    return _computation.get()()


@torch.library.custom_op("internlm::routing", mutates_args=(), schema="(Tensor like) -> Tensor[]")
def _routing(like: Tensor) -> list[Tensor]:
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
