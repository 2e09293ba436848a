"""Statistics by data type against brute force in Python, over micro-batches and ranks."""

from __future__ import annotations

import math

import pytest
import torch

from internlm.core.token_statistics import TokenSums, TypeMetrics, evaluation_results
from internlm.data.batch import IGNORE_INDEX
from internlm.utils.errors import DataError

TYPES = ("cn", "code", "en", "ja")


def micro_batch(generator, num_tokens=40):
    """Random tokens of all types but "ja"; a fifth of them masked, and the losses of those are NaN."""
    labels = torch.randint(0, 50, (1, num_tokens), generator=generator)
    masked = torch.rand(labels.shape, generator=generator) < 0.2
    labels[masked] = IGNORE_INDEX
    losses = torch.rand(labels.shape, generator=generator) * 5
    losses[masked] = math.nan
    correct = torch.rand(labels.shape, generator=generator) < 0.5
    return losses, correct, labels, torch.randint(0, 3, labels.shape, generator=generator)


def brute_force(batches, wanted_type=None):
    """(mean loss, accuracy, tokens) of the valid tokens of one type, or of all."""
    rows = [
        (loss, hit)
        for batch in batches
        for loss, hit, label, type_id in zip(*(tensor.flatten().tolist() for tensor in batch), strict=True)
        if label != IGNORE_INDEX and wanted_type in (None, type_id)
    ]
    return sum(loss for loss, _ in rows) / len(rows), sum(hit for _, hit in rows) / len(rows), len(rows)


def test_training_metrics_equal_brute_force_over_two_ranks():
    generator = torch.Generator().manual_seed(1)
    by_rank = [[micro_batch(generator), micro_batch(generator, 24)] for _ in range(2)]
    ranks = [TypeMetrics(TYPES) for _ in by_rank]
    for metrics, batches in zip(ranks, by_rank, strict=True):
        for batch in batches:
            metrics.update(*batch)
    other = ranks[1].sums.values.clone()
    result = ranks[0].result(lambda values: values + other)
    batches = by_rank[0] + by_rank[1]
    loss, acc, _ = brute_force(batches)
    assert result["loss_from_metric"].item() == pytest.approx(loss, rel=1e-12)
    assert result["acc"].item() == pytest.approx(acc, rel=1e-12)
    assert result["perplexity"].item() == pytest.approx(math.exp(loss), rel=1e-12)
    for type_id, name in enumerate(TYPES[:3]):
        loss, acc, tokens = brute_force(batches, type_id)
        assert result[f"loss/{name}"].item() == pytest.approx(loss, rel=1e-12)
        assert result[f"acc/{name}"].item() == pytest.approx(acc, rel=1e-12)
        assert result[f"tokens/{name}"].item() == tokens
    assert result["tokens/ja"].item() == 0 and math.isnan(result["loss/ja"].item())
    assert all(value.shape == () for value in result.values())


def test_each_step_starts_at_zero():
    generator = torch.Generator().manual_seed(2)
    metrics = TypeMetrics(TYPES)
    metrics.update(*micro_batch(generator))
    metrics.result(lambda values: values)
    batch = micro_batch(generator)
    metrics.update(*batch)
    assert metrics.result(lambda values: values)["loss_from_metric"].item() == pytest.approx(brute_force([batch])[0])


def test_a_reduction_in_place_does_not_reach_the_sums():
    sums = TokenSums(1)
    sums.update(torch.ones(3), torch.ones(3), torch.ones(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64))
    assert evaluation_results("x", sums, lambda values: values.mul_(2)) == evaluation_results("x", sums, lambda v: v)


def test_training_metrics_do_not_wait_for_the_device():
    # A meta tensor has no value: whatever would need one on the host raises.
    metrics = TypeMetrics(TYPES, device="meta")
    metrics.update(*(tensor.to("meta") for tensor in micro_batch(torch.Generator().manual_seed(3))))
    assert metrics.result(lambda values: values)["acc"].is_meta


def test_evaluation_of_a_set():
    generator = torch.Generator().manual_seed(4)
    batches = [micro_batch(generator), micro_batch(generator)]
    sums = TokenSums(len(TYPES))
    for batch in batches:
        sums.update(*batch)
    results = evaluation_results("books", sums, lambda values: values)
    loss, acc, _ = brute_force(batches)
    assert results["val/books_loss"] == pytest.approx(loss, rel=1e-12)
    assert results["val/books_acc"] == pytest.approx(acc, rel=1e-12)
    assert results["val/books_plex"] == pytest.approx(math.exp(loss), rel=1e-12)
    assert len(results) == 3
    by_position = evaluation_results("books", sums, lambda values: values, by_position=True)
    for bucket, positions in enumerate(("0", "1", "2-3")):
        loss, _, tokens = brute_force(batches, bucket)
        assert by_position.pop(f"val/books_loss_by_position/{positions}") == pytest.approx(loss, rel=1e-12)
        assert by_position.pop(f"val/books_tokens_by_position/{positions}") == tokens
    assert by_position == results  # a bucket without labels has no results


def test_a_perplexity_beyond_all_numbers():
    sums = TokenSums(1)
    sums.update(torch.full((4,), 800.0), torch.zeros(4), torch.zeros(4, dtype=torch.int64), torch.zeros(4).long())
    results = evaluation_results("books", sums, lambda values: values)
    assert results == {"val/books_loss": 800.0, "val/books_acc": 0.0, "val/books_plex": math.inf}


def test_a_set_without_labels_is_named():
    with pytest.raises(DataError, match="valid set 'books'"):
        evaluation_results("books", TokenSums(2), lambda values: values)
