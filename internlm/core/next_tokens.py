"""The likeliest next tokens in any layout: a forward pass of the engine whose head returns tokens, not losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from internlm.core.engine import Engine
from internlm.core.token_statistics import TokenSums
from internlm.data.batch import IGNORE_INDEX, MicroBatch
from internlm.model.ops.cross_entropy import LossOutput, VocabShard


def likeliest_tokens(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, num_tokens: int, vocab: VocabShard | None = None
) -> LossOutput:
    """A `LossFunction` whose losses are the ids of the likeliest next tokens.

    Functions that are monotonic in the logits, as soft caps and factors are, do not change them.

    Args:
        hidden: `[T, h]`.
        weight: `[V, h]`, the output head, or this rank's part of it.
        labels: int64 `[T]`; tokens with `IGNORE_INDEX` are left out.
        num_tokens: ids from this one on (the padding of the vocabulary) are never chosen.
        vocab: this rank's part of the vocabulary, if it is split over ranks.

    Returns:
        Ids as float64 in `token_losses`; of equally likely tokens the first one, as `argmax` does.
    """
    places = (labels != IGNORE_INDEX).nonzero()[:, 0]
    logits = (hidden[places] @ weight.t()).double()
    start, size = (0, weight.shape[0]) if vocab is None else (vocab.start, vocab.size)
    logits[:, size:] = -torch.inf
    logits[:, max(num_tokens - start, 0) :] = -torch.inf
    best, at = logits.max(dim=1)
    chosen = (at + start).double()
    if vocab is not None:
        own = best.clone()
        vocab.max(best)
        # The lowest id among the ranks that have the maximum.
        chosen = torch.where(own == best, chosen, torch.inf)
        vocab.min(chosen)
    ids = torch.zeros(labels.shape, dtype=torch.float64, device=labels.device)
    ids[places] = chosen
    return LossOutput(ids.sum() * 0.0, ids, torch.zeros_like(labels, dtype=torch.bool))


def next_tokens(engine: Engine, micro_batch: MicroBatch, ends: Sequence[tuple[int, int]], num_tokens: int) -> list[int]:
    """The likeliest token after each of several texts; collective, the same on all ranks.

    Args:
        engine: holds the model.
        micro_batch: with the texts, the same on all ranks; its labels are ignored.
        ends: row and column of the last token of each text.
        num_tokens: ids from this one on are never chosen.
    """
    labels = torch.full_like(micro_batch.labels, IGNORE_INDEX)
    type_ids = torch.zeros_like(micro_batch.type_ids)
    for number, (row, column) in enumerate(ends):
        labels[row, column], type_ids[row, column] = 0, number
    marked = replace(micro_batch, labels=labels, type_ids=type_ids, num_valid_tokens=len(ends))
    sums = TokenSums(len(ends), engine.context.device)

    def head(hidden: Tensor, weight: Tensor, labels: Tensor, *, vocab: VocabShard | None = None) -> LossOutput:
        return likeliest_tokens(hidden, weight, labels, num_tokens=num_tokens, vocab=vocab)

    engine.evaluate(marked, sums, head)
    # Each data rank has all texts, so sums are multiples of the ids, and so are the counts.
    totals = engine.sum_over_tokens(sums.values)
    return [round(total / count) for total, _, count in totals.tolist()]
