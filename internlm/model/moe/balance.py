"""Balance of the load of experts: losses that are added to the loss of a step, and the rule for a selection bias.

Every loss is a sum over the tokens of this rank, divided by the number of tokens of the sample. Where ranks share a
sample, the sum of their losses is that of one process with all of its tokens, and the same holds for gradients. Counts
cover the whole sample: the caller sums them over these ranks first.

t tokens of this rank, E experts, k of them for a token, n sequences. `valid`, bool `[t]`, excludes padding; counts and
the number of tokens then cover valid tokens only.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


def load_balancing_loss(
    probabilities: Tensor, counts: Tensor, num_tokens: int | Tensor, top_k: int, *, valid: Tensor | None = None
) -> Tensor:
    """E sum_e f_e P_e, with f_e = count_e / (k T) and P_e the mean of p_e over the T tokens of a sample.

    1 at perfect balance, at most E / k. GShard, https://arxiv.org/abs/2006.16668, section 2.2; Switch,
    https://arxiv.org/abs/2101.03961, equations 4-6. With counts and `num_tokens` of a whole global batch: global-batch
    balance, https://arxiv.org/abs/2501.11873.

    Args:
        probabilities: `[t, E]` with gradient, rows that add up to 1 (`expert_distribution`).
        counts: `[E]`, tokens of each expert in the sample; a constant in the backward pass.
        num_tokens: T; on the device if it is a tensor.
        top_k: k.
        valid: see the module.

    Returns:
        Scalar in the dtype of `probabilities`.
    """
    total = _at_least_one(num_tokens)
    sums = _only_valid(probabilities, valid).sum(0)
    frequencies = counts.detach().to(sums.dtype) / (top_k * total)
    return sums.shape[-1] * (frequencies * sums).sum() / total


def z_loss(logits: Tensor, num_tokens: int | Tensor, *, valid: Tensor | None = None) -> Tensor:
    """Mean of logsumexp(logits)^2 over the tokens of a sample, which keeps logits small.

    ST-MoE, https://arxiv.org/abs/2202.08906, equation 5.

    Args:
        logits: `[t, E]` with gradient.
        num_tokens: tokens of the sample; on the device if it is a tensor.
        valid: see the module.

    Returns:
        Scalar in fp32 (float64 for float64 logits).
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return _only_valid(logits.logsumexp(-1).square(), valid).sum() / _at_least_one(num_tokens)


def sequence_balancing_loss(
    probabilities: Tensor,
    counts: Tensor,
    sequences: Tensor,
    num_tokens: int | Tensor,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """E sum_e f_e P_e of each sequence, averaged over sequences with their numbers of tokens as weights.

    DeepSeek-V3, https://arxiv.org/abs/2412.19437, equations 17-20, where all sequences have one length. In a packed
    row, a sequence is a document.

    Args:
        probabilities: `[t, E]` with gradient, rows that add up to 1 (`expert_distribution`).
        counts: `[n, E]`, tokens of each expert in each sequence, of all ranks that share it (`counts_by_sequence`).
        sequences: int64 `[t]`, the sequence of each token (`sequences_of`).
        num_tokens: tokens of the sample; on the device if it is a tensor.
        valid: see the module.

    Returns:
        Scalar in the dtype of `probabilities`.
    """
    counts = counts.detach()
    # The counts of a sequence add up to k times its tokens.
    frequencies = counts.to(probabilities.dtype) / counts.sum(-1, keepdim=True).clamp(min=1)
    products = frequencies[sequences] * _only_valid(probabilities, valid)
    return products.shape[-1] * products.sum() / _at_least_one(num_tokens)


def sequences_of(cu_seqlens: Tensor, positions: Tensor) -> Tensor:
    """The document of each token of a packed row.

    Args:
        cu_seqlens: `[n + 1]`, bounds of the documents, from 0 to the length of the row; documents may be empty.
        positions: `[t]`, positions of the tokens in the row, in any order.

    Returns:
        int64 `[t]`, 0 <= document < n.
    """
    return torch.bucketize(positions, cu_seqlens[1:], right=True)


def counts_by_expert(experts: Tensor, num_experts: int, *, valid: Tensor | None = None) -> Tensor:
    """Tokens of each expert, on this rank.

    Args:
        experts: int64 `[t, k]`, from `choose_experts`.
        num_experts: E.
        valid: see the module.

    Returns:
        int64 `[E]`.
    """
    return _counts(experts, num_experts, valid)


def counts_by_sequence(
    experts: Tensor, sequences: Tensor, num_sequences: int, num_experts: int, *, valid: Tensor | None = None
) -> Tensor:
    """Tokens of each expert in each sequence, on this rank.

    Args:
        experts: int64 `[t, k]`, from `choose_experts`.
        sequences: int64 `[t]`, the sequence of each token.
        num_sequences: n.
        num_experts: E.
        valid: see the module.

    Returns:
        int64 `[n, E]`.
    """
    cells = sequences[:, None] * num_experts + experts
    return _counts(cells, num_sequences * num_experts, valid).view(num_sequences, num_experts)


@dataclass(frozen=True)
class BiasRule:
    """How the selection biases of routers change after each step; see `updated_bias`.

    Attributes:
        rate: size of the change; DeepSeek-V3 uses 1e-3. 0: they do not change.
        centers: whether the mean over the experts is subtracted from the change, so that a bias does not drift.
    """

    rate: float = 0.0
    centers: bool = False


@torch.no_grad()
def updated_bias(bias: Tensor, counts: Tensor, rule: BiasRule) -> Tensor:
    """The selection bias of the next step: b_e + rate sign(mean count - count_e).

    Auxiliary-loss-free balancing, https://arxiv.org/abs/2408.15664, algorithm 1. The sign, and the mean of the signs,
    are computed in integers, so equal counts give bit-equal biases in every layout. The sign is 0 for an expert at
    exactly the mean.

    Args:
        bias: fp32 or float64 `[..., E]`.
        counts: int64 `[..., E]`, tokens of each expert in a whole step, of all micro-batches and ranks.
        rule: rate, and whether the change is centered.

    Returns:
        A new tensor like `bias`.
    """
    num_experts = counts.shape[-1]
    signs = (counts.sum(-1, keepdim=True) - counts * num_experts).sign()
    if not rule.centers:
        return bias + signs.to(bias.dtype) * rule.rate
    return bias + (signs * num_experts - signs.sum(-1, keepdim=True)).to(bias.dtype) * (rule.rate / num_experts)


def _counts(cells: Tensor, num_cells: int, valid: Tensor | None) -> Tensor:
    ones = torch.ones_like(cells) if valid is None else valid[:, None].to(torch.int64).expand_as(cells)
    # bincount would wait for the device.
    return cells.new_zeros(num_cells).scatter_add_(0, cells.flatten(), ones.flatten())


def _only_valid(values: Tensor, valid: Tensor | None) -> Tensor:
    """`values`, `[t]` or `[t, E]`, with zeros at tokens that are not valid."""
    if valid is None:
        return values
    return values.where(valid if values.dim() == 1 else valid[:, None], 0.0)


def _at_least_one(num_tokens: int | Tensor) -> int | Tensor:
    """The losses of a sample without a valid token are 0."""
    return num_tokens.clamp(min=1) if isinstance(num_tokens, Tensor) else max(num_tokens, 1)
