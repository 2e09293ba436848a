"""Samples that are dealt to context ranks: every value of a token moves with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers.ranks import RankPool
from helpers.tiny import micro_batch, tiny_config
from torch import Tensor

from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.multi_token_loss import later_tokens
from internlm.core.parallel.context.split_batch import ContextOptions, ContextSplit, SplitDocuments, SplitSample
from internlm.core.parallel.model_parallel import ParallelOptions, parallel_of
from internlm.core.parallel.parallelize import parallelize
from internlm.core.token_statistics import TokenSums
from internlm.data.batch import IGNORE_INDEX, MicroBatch
from internlm.model.registry import build_model
from internlm.utils.errors import ConfigError
from internlm.verify.case import Case, Combination
from internlm.verify.run import CaseRun, start_case

LENGTHS = (7, 1, 12, 4)


def split_of(micro: MicroBatch, num_ranks: int = 4, tensor: int = 1, **options: object) -> list[SplitSample]:
    chosen = ContextOptions(**options)  # type: ignore[arg-type]
    return [ContextSplit(rank, num_ranks, tensor, {None: 2, 5: 1}, chosen).split(micro) for rank in range(num_ranks)]


def joined(samples: list[SplitSample], values: Callable[[MicroBatch], Tensor]) -> Tensor:
    """The values of all ranks, in the order of the sample."""
    parts = [sample.micro_batch for sample in samples]
    indices = torch.cat([part.token_indices.flatten() for part in parts if part.token_indices is not None])
    gathered = torch.cat([values(part)[0] for part in parts])
    result = torch.empty_like(gathered)
    result[indices] = gathered
    return result


@pytest.mark.parametrize("cut", ["auto", "contiguous", "zigzag", "document_zigzag"])
def test_every_value_of_a_token_moves_with_it(cut: str) -> None:
    micro = micro_batch(0, LENGTHS)
    micro.extra["weights"] = torch.randn(1, sum(LENGTHS), 3)
    micro.later = [later_tokens(micro, m) for m in (1, 2)]
    samples = split_of(micro, cut=cut)
    values: list[Callable[[MicroBatch], Tensor]] = [
        lambda m: m.input_ids,
        lambda m: m.labels,
        lambda m: m.position_ids,
        lambda m: m.type_ids,
        lambda m: m.later[1].input_ids,
        lambda m: m.later[0].labels,
        lambda m: m.extra["weights"],
    ]
    for value in values:
        assert torch.equal(joined(samples, value), value(micro)[0])
    for part, plans in samples:
        assert part.input_ids.shape == (1, sum(LENGTHS) // 4)
        assert part.lengths == LENGTHS and part.num_valid_tokens == micro.num_valid_tokens
        assert part.num_sample_tokens == sum(LENGTHS) and plans is not None and set(plans.plans) == {None, 5}
        documents = SplitSample(part, plans).documents(part)
        assert isinstance(documents, SplitDocuments) and documents.cu_seqlens.tolist() == [0, 7, 8, 20, 24]


def test_rows_become_documents() -> None:
    ids = torch.arange(24).view(2, 12)
    micro = MicroBatch(ids, ids + 1, ids % 12, ids * 0, None, None, 24)
    samples = split_of(micro)
    assert torch.equal(joined(samples, lambda m: m.position_ids), torch.arange(12).repeat(2))
    assert all(sample.micro_batch.lengths == (12, 12) for sample in samples)


def test_a_sample_that_the_ranks_do_not_divide_ends_with_padding() -> None:
    micro = micro_batch(0, (7, 1, 12, 3))
    samples = split_of(micro, num_ranks=4, tensor=2)
    assert all(part.lengths == (7, 1, 12, 3, 1) and part.input_ids.shape == (1, 6) for part, _ in samples)
    assert torch.equal(joined(samples, lambda m: m.input_ids)[:23], micro.input_ids[0])
    labels = joined(samples, lambda m: m.labels)
    assert torch.equal(labels[:23], micro.labels[0]) and labels[23] == IGNORE_INDEX
    assert joined(samples, lambda m: m.is_padding).tolist() == [False] * 23 + [True]  # type: ignore[arg-type, return-value]
    assert all(part.num_padding_tokens == 1 for part, _ in samples)


def test_plans_of_equal_samples_are_made_once() -> None:
    split = ContextSplit(0, 4, 1, {None: 1}, ContextOptions())
    first, second = (split.split(micro_batch(number, LENGTHS)) for number in range(2))
    assert first.plans is second.plans


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cut": "zig_zag"}, "cut = 'zig_zag': it must be one of 'auto', 'contiguous', 'zigzag', 'document_zigzag'"),
        ({"exchange": "double_ring"}, "exchange = 'double_ring': it must be one of 'auto', 'ring', 'direct', "),
        ({"exchange": "direct", "windows": ((0, 1), (2, 3))}, "exchange = 'direct' does not work with windows"),
    ],
)
def test_options_that_do_not_exist_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ContextOptions(**options)


# -- evaluation -------------------------------------------------------------------------------------------------------


def evaluated(case: Case, lengths: tuple[int, ...]) -> list[float]:
    """Sum of losses, number of correct and number of valid tokens of a sample, of all ranks."""
    context = start_case(case)
    engine = CaseRun(case, context).trainer.engine
    sums = TokenSums(1)
    engine.evaluate(micro_batch(3, lengths), sums)
    result: list[float] = engine.sum_over_tokens(sums.values).flatten().tolist()
    context.close()
    return result


@pytest.mark.parametrize("layout", ["context=2", "context=2,tensor=2,mode=msp", "context=2,tensor=2,mode=isp,weight=2"])
def test_samples_of_any_length_are_evaluated(layout: str, ranks: Callable[[int], RankPool]) -> None:
    """Lengths that differ from those of training, and that no rank divides."""
    world_size = 4 if "tensor" in layout else 2
    case = Combination.parse(f"ranks={world_size} layout:{layout} model:dtype=float64").case()
    for lengths in ((3, 10, 6), (5,), (1, 1, 1)):
        (expected,) = ranks(1).run(evaluated, case.reference(), lengths)
        for values in ranks(world_size).run(evaluated, case, lengths):
            assert values == pytest.approx(expected, rel=1e-12)


def outputs(has_stated_windows: bool) -> Tensor:
    """Hidden states of this rank's tokens, in float64."""
    context = ParallelContext.create(ParallelLayout(world_size=2, context=2))
    with torch.device("meta"):
        model = build_model("MISTRAL", tiny_config(sliding_window=5, dtype="torch.float64"))
    if not has_stated_windows:
        del model.attention_windows
    parallel = parallel_of(
        parallelize(model, context, seed=7, options=ParallelOptions(context=ContextOptions("zigzag")))
    )
    sample = parallel.split_sample(micro_batch(0, LENGTHS))
    part = sample.micro_batch
    hidden: Tensor = model(part.input_ids, part.position_ids, sample.documents(part)).detach()
    context.close()
    return hidden


def test_a_model_need_not_state_its_windows(ranks: Callable[[int], RankPool]) -> None:
    """They only matter for the choice of a cut."""
    for stated, found in zip(ranks(2).run(outputs, True), ranks(2).run(outputs, False), strict=True):
        assert torch.equal(stated, found)
