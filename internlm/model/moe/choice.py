"""The choices of a router for the tokens of a pass, as one operator.

Recomputation never repeats `internlm::choose_experts`: a second choice could differ, and would be counted twice. A
compiler does not look into it, so what it calls may count, communicate and read files.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from internlm.model.moe.sample_tokens import SampleTokens


class ExpertChoice(NamedTuple):
    """What recomputation does not repeat; a tensor without elements stands for one that is not needed.

    Attributes:
        experts: int64 `[T, k]`.
        kept: bool `[T, k]`, choices that are not dropped.
        counts: int64 `[E]`, choices of each expert in the sample that the balance loss counts.
        valid, num_valid, sequences: see `SampleTokens`.
        sequence_counts: int64 `[n, E]`, likewise in each sequence of the sample.
    """

    experts: Tensor
    kept: Tensor
    counts: Tensor
    valid: Tensor
    num_valid: Tensor
    sequences: Tensor
    sequence_counts: Tensor


class Chooser(Protocol):
    """A router, as the operator sees it."""

    def choose(
        self, logits: Tensor, scores: Tensor, sample: SampleTokens, num_rows: int, *, is_training: bool
    ) -> ExpertChoice:
        """Choose experts, and count them in training; returns new tensors.

        Args:
            logits, scores: `[T, E]`, without gradient.
            sample: its tokens, without positions and number, which are those of the router's next sample.
            num_rows: number of rows of the sample.
            is_training: whether choices are counted.
        """


_choosers: WeakValueDictionary[int, Chooser] = WeakValueDictionary()
_numbers = itertools.count()


def handle_of(chooser: Chooser) -> Tensor:
    """A new handle, by which the operator finds `chooser`.

    A number on the host, as a tensor: compiled code takes it as an input, where an integer would be a constant, and
    every layer would be compiled anew.
    """
    number = next(_numbers)
    _choosers[number] = chooser
    return torch.tensor(number, device="cpu")


def choose(
    handle: Tensor,
    logits: Tensor,
    scores: Tensor,
    sample: SampleTokens,
    num_rows: int,
    *,
    top_k: int,
    drops: bool,
    is_training: bool,
) -> ExpertChoice:
    """`Chooser.choose` as one operator.

    Args:
        handle: from `handle_of`.
        logits, scores, sample, num_rows, is_training: see `Chooser.choose`.
        top_k: k.
        drops: whether choices may be dropped.
    """
    tokens = sample.valid, sample.num_valid, sample.sequences, sample.num_sequences
    return ExpertChoice(
        *_choose(handle, logits.detach(), scores.detach(), *tokens, num_rows, top_k, drops, is_training)
    )


@torch.library.custom_op(
    "internlm::choose_experts",
    mutates_args=(),
    schema="(Tensor handle, Tensor logits, Tensor scores, Tensor? valid, Tensor? num_valid, Tensor? sequences, "
    "SymInt num_sequences, SymInt num_rows, int top_k, bool drops, bool is_training) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _choose(
    handle: Tensor,
    logits: Tensor,
    scores: Tensor,
    valid: Tensor | None,
    num_valid: Tensor | None,
    sequences: Tensor | None,
    num_sequences: int,
    num_rows: int,
    top_k: int,
    drops: bool,
    is_training: bool,
) -> tuple[Tensor, ...]:
    sample = SampleTokens(valid, num_valid, sequences, num_sequences)
    return _choosers[int(handle)].choose(logits, scores, sample, num_rows, is_training=is_training)


@_choose.register_fake
def _(
    handle: Tensor,
    logits: Tensor,
    scores: Tensor,
    valid: Tensor | None,
    num_valid: Tensor | None,
    sequences: Tensor | None,
    num_sequences: int,
    num_rows: int,
    top_k: int,
    drops: bool,
    is_training: bool,
) -> tuple[Tensor, ...]:
    num_tokens, num_experts = scores.shape

    def like(shown: Tensor | None) -> Tensor:
        is_needed = is_training and shown is not None
        return torch.empty_like(shown) if is_needed else scores.new_empty(0, dtype=torch.int64)  # type: ignore[arg-type]

    return ExpertChoice(
        scores.new_empty(num_tokens, top_k, dtype=torch.int64),
        scores.new_empty((num_tokens, top_k) if drops else 0, dtype=torch.bool),
        scores.new_empty(num_experts if is_training else 0, dtype=torch.int64),
        like(valid),
        like(num_valid),
        like(sequences),
        scores.new_empty(
            (num_sequences, num_experts) if is_training and sequences is not None else 0, dtype=torch.int64
        ),
    )
