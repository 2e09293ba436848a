"""Fused output head and cross entropy over chunks of tokens, so that the full logits are never materialized.

The gradient of a sum of token losses is known up to a factor before backward begins. So it is computed in the forward
pass from a chunk's probabilities, and the backward pass only scales it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from internlm.model.ops.cpu.gemm import gemm, widens
from internlm.model.ops.implementation_choice import Choice
from internlm.model.ops.linear import weight_gradient

IGNORE_INDEX = -100
"""The label of a token that contributes no loss."""

_CHUNK_TOKENS = 1024
"""Tokens per chunk: enough for a full-speed GEMM."""

_COMPILED_CHUNK_TOKENS = 2048
"""The same where the loss is compiled: the logits have no fp32 copy, and the weight's gradient is accumulated half as
often."""

_CACHE_ELEMENTS = 1 << 19
"""Logits converted to fp32 at once on CPU: 2 MiB, which fits into a core's cache."""


def choice(device: torch.device) -> Choice:
    """The implementation of `linear_cross_entropy`."""
    return Choice("own autograd function", "chunked over tokens, gradient in the forward pass, on every device")


class LossOutput(NamedTuple):
    """Result of `linear_cross_entropy`; T tokens.

    Attributes:
        loss_sum: fp32 scalar with gradient: the sum over valid tokens, with label smoothing and z-loss.
        token_losses: fp32 `[T]` without gradient: negative log-likelihood in nats, 0 at ignored tokens.
        correct: bool `[T]`, whether the label has the largest logit (the first of equal ones), False at ignored tokens;
            None if not requested.
    """

    loss_sum: Tensor
    token_losses: Tensor
    correct: Tensor | None


LossFunction = Callable[..., LossOutput]
"""`(hidden [T, h], head weight [V, h], labels [T])` -> `LossOutput`. If a layout splits the vocabulary over ranks, it
gets only this rank's rows of the weight, and the keyword argument `vocab`, a `VocabShard`."""


class VocabShard(Protocol):
    """This rank's token ids of a vocabulary that is split over ranks, and in-place reductions over these ranks.

    Attributes:
        start: this rank's first token id.
        size: number of its token ids; the remaining rows of its weight are padding.
        total: V, size of the vocabulary.
    """

    start: int
    size: int
    total: int

    def sum(self, tensor: Tensor) -> Tensor: ...

    def max(self, tensor: Tensor) -> Tensor: ...

    def min(self, tensor: Tensor) -> Tensor: ...


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    label_smoothing: float = 0.0,
    z_loss_coeff: float = 0.0,
    softcap: float | None = None,
    chunk_tokens: int | None = None,
    with_accuracy: bool = False,
    compiled: bool = False,
    vocab: VocabShard | None = None,
) -> LossOutput:
    """Sum of the cross entropy of `softmax(hidden weight^T)` over the tokens whose label is not `IGNORE_INDEX`.

    Args:
        hidden: `[T, h]`.
        weight: `[V, h]`, the output head, in the dtype of hidden.
        labels: int64 `[T]` in [0, V), or `IGNORE_INDEX`.
        label_smoothing: fraction of the target distribution that is spread over the vocabulary, as in
            `torch.nn.functional.cross_entropy`.
        z_loss_coeff: factor on the squared log-partition of each valid token, added to its loss (PaLM, section 5).
        softcap: c, where the logits l are c tanh(l / c) (Gemma 2, arXiv:2408.00118, section 2); None: they are l.
        chunk_tokens: tokens per chunk; only the logits of one chunk are in memory. None: as many as are fast.
        with_accuracy: also return which tokens are predicted correctly.
        compiled: compile the loss of a chunk on GPUs. Ignored on CPU, where rows stay in the cache, and with `vocab`,
            where ranks communicate in between.
        vocab: this rank's part of the vocabulary, if it is split over ranks. All these ranks call with the same tokens.
            Costs two small reductions per chunk (Shoeybi et al. 2019, arXiv:1909.08053).

    Returns:
        `LossOutput`. Without a valid token, the loss and every gradient are 0. With `vocab`, the losses are equal on
        all ranks, and the gradient of `hidden` is this rank's term of a sum over the ranks.
    """
    assert hidden.dim() == 2 and weight.dim() == 2 and labels.shape == hidden.shape[:1]
    wants_grad = torch.is_grad_enabled()
    correct = torch.empty(labels.shape, dtype=torch.bool, device=labels.device) if with_accuracy else None
    compiled = compiled and hidden.is_cuda and vocab is None
    if chunk_tokens is None:
        chunk_tokens = _COMPILED_CHUNK_TOKENS if compiled else _CHUNK_TOKENS
    loss_sum, token_losses = _LinearCrossEntropy.apply(
        hidden,
        weight,
        labels,
        label_smoothing,
        z_loss_coeff,
        softcap,
        chunk_tokens,
        wants_grad,
        correct,
        compiled,
        vocab,
    )
    return LossOutput(loss_sum, token_losses, correct)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        label_smoothing: float,
        z_loss_coeff: float,
        softcap: float | None,
        chunk_tokens: int,
        wants_grad: bool,
        correct: Tensor | None,
        compiled: bool,
        vocab: VocabShard | None,
    ) -> tuple[Tensor, Tensor]:
        """`correct` is an output buffer, not part of the graph."""
        wide = torch.promote_types(hidden.dtype, torch.float32)
        num_tokens = hidden.shape[0]
        grads_hidden = wants_grad and ctx.needs_input_grad[0]
        grads_weight = wants_grad and ctx.needs_input_grad[1]
        token_losses = torch.empty(num_tokens, dtype=wide, device=hidden.device)
        objectives = torch.empty_like(token_losses)
        grad_hidden = torch.empty_like(hidden) if grads_hidden else None
        grad_weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if grads_weight else None
        rows_loss = _compiled_rows_loss() if compiled else _rows_loss
        # One buffer for all chunks, as newly allocated memory would have to be mapped for each.
        buffer = hidden.new_empty(min(chunk_tokens, num_tokens), weight.shape[0])

        for start in range(0, num_tokens, chunk_tokens):
            tokens = slice(start, min(start + chunk_tokens, num_tokens))
            logits = _gemm_into(buffer[: tokens.stop - start], hidden[tokens], weight.t())
            # On CPU, a block of rows fits into the cache; with `vocab`, one reduction serves the whole chunk.
            one_block = hidden.is_cuda or vocab is not None
            rows = logits.shape[0] if one_block else max(1, _CACHE_ELEMENTS // weight.shape[0])
            for first in range(0, logits.shape[0], rows):
                block = slice(first, first + rows)
                block_tokens = slice(start + first, min(start + first + rows, tokens.stop))
                objectives[block_tokens], token_losses[block_tokens] = rows_loss(
                    logits[block],
                    labels[block_tokens],
                    label_smoothing,
                    z_loss_coeff,
                    softcap,
                    grads_hidden or grads_weight,
                    None if correct is None else correct[block_tokens],
                    vocab,
                )
            if grad_hidden is not None:
                _gemm_into(grad_hidden[tokens], logits, weight)
            if grad_weight is not None:
                if grad_weight.dtype == logits.dtype:
                    grad_weight.addmm_(logits.t(), hidden[tokens])
                elif hidden.is_cuda and torch.version.hip is None:
                    # Accumulates in fp32 within the GEMM: exact products, and no pass over the weight.
                    torch.addmm(grad_weight, logits.t(), hidden[tokens], out_dtype=wide, out=grad_weight)
                elif start == 0:
                    grad_weight.copy_(weight_gradient(logits, hidden[tokens]))
                else:
                    grad_weight += weight_gradient(logits, hidden[tokens])
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        ctx.mark_non_differentiable(token_losses)
        return objectives.sum(), token_losses

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            # Not in bf16: rounding the factor would scale all gradients except the head's by up to 0.4 %.
            grad_hidden = (grad_hidden.to(grad.dtype) * grad).to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = (grad_weight * grad).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, *[None] * 9


def _gemm_into(out: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`a b`, written to `out`."""
    return out.copy_(gemm(a, b)) if widens(a.device, a.dtype) else torch.mm(a, b, out=out)


def _rows_loss(
    logits: Tensor,
    labels: Tensor,
    label_smoothing: float,
    z_loss_coeff: float,
    softcap: float | None,
    wants_grad: bool,
    correct: Tensor | None,
    vocab: VocabShard | None,
) -> tuple[Tensor, Tensor]:
    """(loss, negative log-likelihood) of each row of logits `[t, V]`.

    With `wants_grad`, overwrites the logits with the gradient of the summed loss; writes `correct` `[t]` if given.
    """
    valid = labels != IGNORE_INDEX
    targets = labels.clamp(min=0).unsqueeze(-1)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if vocab is None:
        num_classes = scores.shape[-1]
        is_here = None
        largest = scores.amax(-1, keepdim=True)
        target_scores = scores.gather(-1, targets)
        if correct is not None:
            correct.copy_(_first_largest(scores, targets, largest) & valid)
        probabilities = torch.softmax(scores, dim=-1)
        # The largest probability is exp(0) / sum(exp(score - largest)), whose logarithm yields the log-partition.
        log_partition = largest - probabilities.amax(-1, keepdim=True).log_()
        mean_scores = scores.mean(-1) if label_smoothing else None
    else:
        num_classes = vocab.total
        own = scores[:, : vocab.size]
        is_here = (targets >= vocab.start) & (targets < vocab.start + vocab.size)
        targets = (targets - vocab.start).masked_fill(~is_here, 0)
        largest = vocab.max(_row_max(own))
        if correct is not None:
            correct.copy_(_is_first_largest_of_all(own, labels, largest, vocab) & valid)
        probabilities = torch.zeros_like(scores)
        torch.exp(own - largest, out=probabilities[:, : vocab.size])
        target_scores = scores.gather(-1, targets).masked_fill_(~is_here, 0.0)
        sums = torch.cat((probabilities.sum(-1, keepdim=True), target_scores, own.sum(-1, keepdim=True)), dim=-1)
        partition, target_scores, all_scores = vocab.sum(sums).split(1, dim=-1)
        probabilities.div_(partition)
        log_partition = largest + partition.log()
        mean_scores = all_scores.squeeze(-1) / num_classes
    nll = (log_partition - target_scores).squeeze(-1)
    objective = nll
    if label_smoothing:
        assert mean_scores is not None
        spread = log_partition.squeeze(-1) - mean_scores
        objective = (1 - label_smoothing) * nll + label_smoothing * spread
    if z_loss_coeff:
        objective = objective + z_loss_coeff * log_partition.squeeze(-1).square()
    if wants_grad:
        # d/dlogits: p - target distribution, and 2 c log Z p for the z-loss.
        gradient = probabilities
        if z_loss_coeff:
            gradient.mul_(2 * z_loss_coeff * log_partition + 1)
        if label_smoothing:
            gradient.sub_(label_smoothing / num_classes)
        if torch.compiler.is_compiling():
            # As an elementwise operator, which the compiler fuses.
            gradient.add_(torch.where(_class_indices(scores) == targets.int(), label_smoothing - 1.0, 0.0))
        else:
            at_target = gradient.new_full(targets.shape, label_smoothing - 1.0)
            gradient.scatter_add_(-1, targets, at_target if is_here is None else at_target.masked_fill_(~is_here, 0.0))
        if softcap is not None:
            # d/dl of c tanh(l / c).
            gradient.mul_(1 - (scores / softcap).square())
        _clear_rows(gradient, ~valid)
        if vocab is not None:
            gradient[:, vocab.size :] = 0.0
        logits.copy_(gradient)
    return objective.masked_fill(~valid, 0.0), nll.masked_fill(~valid, 0.0)


@functools.cache
def _compiled_rows_loss() -> Callable[..., tuple[Tensor, Tensor]]:
    """`_rows_loss` in three passes over the logits instead of ten. The first call imports the compiler (2 s)."""
    return torch.compile(_rows_loss)


def _clear_rows(gradient: Tensor, rows: Tensor) -> None:
    """Set rows (bool `[t]`) to zero. Not by multiplication, which would turn infinite values into NaN."""
    if gradient.device.type == "cpu" and not torch.compiler.is_compiling():
        # Usually few rows or none, so finding them is faster than a pass over all.
        gradient.index_fill_(0, rows.nonzero().squeeze(-1), 0.0)
    else:
        gradient.masked_fill_(rows.unsqueeze(-1), 0.0)


def _row_max(scores: Tensor) -> Tensor:
    """The largest score of each row `[t, 1]`; -inf on a rank whose part of the vocabulary is empty."""
    if scores.shape[-1] == 0:
        return scores.new_full((scores.shape[0], 1), -torch.inf)
    return scores.amax(-1, keepdim=True)


def _is_first_largest_of_all(own: Tensor, labels: Tensor, largest: Tensor, vocab: VocabShard) -> Tensor:
    """Whether the label is the first class with the largest score over all ranks: bool `[t]`."""
    first = labels.new_full(labels.shape, vocab.total)
    if own.shape[-1]:
        index = own.argmax(-1, keepdim=True)
        is_largest = (own.gather(-1, index) == largest).squeeze(-1)
        first = torch.where(is_largest, index.squeeze(-1) + vocab.start, first)
    return vocab.min(first) == labels


def _class_indices(scores: Tensor) -> Tensor:
    """The index of each class: int32 `[V]`."""
    return torch.arange(scores.shape[-1], dtype=torch.int32, device=scores.device)


def _first_largest(scores: Tensor, targets: Tensor, largest: Tensor) -> Tensor:
    """Whether the target `[t, 1]` is the first class with the largest score of its row: bool `[t]`."""
    if torch.compiler.is_compiling():
        is_before = (scores == largest) & (_class_indices(scores) < targets.int())
        return (scores.gather(-1, targets) == largest).squeeze(-1) & ~is_before.any(-1)
    if scores.is_cuda:
        return (scores.argmax(-1, keepdim=True) == targets).squeeze(-1)
    # On CPU, `amax` is vectorized and `argmax` is not, so it is called only for rows with ties.
    hit = (scores.gather(-1, targets) == largest).squeeze(-1)
    rows = hit.nonzero().squeeze(-1)
    without_target = scores[rows].scatter_(-1, targets[rows], -torch.inf)
    tied = rows[(without_target.amax(-1) == largest[rows, 0]).nonzero().squeeze(-1)]
    hit[tied] = scores[tied].argmax(-1) == targets[tied, 0]
    return hit
