"""Defects that parallel training frameworks have had, each as the smallest layouts that show it.

Every one of them trains, with a loss that falls; only the comparison with one process tells. Gradients, norms and
weights are compared, too (see `internlm.verify.compare`), so that what is only wrong in the second digit is seen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from helpers.layouts import assert_equal_to_one_process, record_of, reference_of
from helpers.ranks import RankPool

from internlm.verify.case import Combination

Ranks = Callable[[int], RankPool]

SPLITS = ("tensor=2,mode=mtp", "tensor=2,mode=msp", "tensor=2,mode=fsp", "tensor=2,mode=isp,weight=2")
SEQUENCE_SPLITS = SPLITS[1:]
V_SHAPED = ("pipeline=2,schedule=ZBV", "pipeline=2,schedule=DUALPIPEV")
PIPELINES = ("pipeline=2", "pipeline=2,chunks=2", "pipeline=2,schedule=ZBH1", *V_SHAPED)


@pytest.mark.parametrize("split", SEQUENCE_SPLITS)
def test_norms_under_sequence_parallelism_sum_their_gradients_over_the_tokens_of_all_ranks(
    split: str, ranks: Ranks
) -> None:
    """Each rank norms its own tokens, so each has a part of the gradient; the last norm, before the head, as well."""
    assert_equal_to_one_process(f"ranks=2 layout:{split}", ranks)
    assert_equal_to_one_process(f"ranks=4 layout:{split},pipeline=2", ranks)


@pytest.mark.parametrize("split", SPLITS)
def test_norms_of_query_and_key_heads_sum_their_gradients_over_the_heads_of_all_ranks(split: str, ranks: Ranks) -> None:
    assert_equal_to_one_process(f"ranks=2 layout:{split} model:family=QWEN3", ranks)


@pytest.mark.parametrize("split", SPLITS)
def test_the_bias_of_a_row_split_layer_is_added_once(split: str, ranks: Ranks) -> None:
    """Added on every rank before the sum, it counts as many times as there are ranks."""
    assert_equal_to_one_process(f"ranks=2 layout:{split} model:bias=true", ranks)


@pytest.mark.parametrize("layout", [*SPLITS, *PIPELINES, "tensor=2,mode=msp,pipeline=2,zero=1"])
def test_the_gradient_norm_counts_each_weight_once(layout: str, ranks: Ranks) -> None:
    """Clipped to a tenth of its norm: what is counted twice changes every weight."""
    world = Combination.parse(f"ranks=1 layout:{layout}").layout
    text = f"ranks={2 * world.tensor * world.pipeline} layout:{layout} model:tied=true stepping:clip=0.1"
    assert_equal_to_one_process(text, ranks)


@pytest.mark.parametrize("layout", ["tensor=2,mode=isp,weight=2", "pipeline=2,schedule=ZBV", "fsdp"])
@pytest.mark.parametrize("groups", ["frozen_ends", "frozen_layer", "factors"])
def test_parameter_groups_hold_in_every_layout(layout: str, groups: str, ranks: Ranks) -> None:
    """Frozen weights are in no bucket, in no norm and in no gather of updates."""
    assert_equal_to_one_process(f"ranks=2 layout:{layout} stepping:groups={groups},clip=0.1", ranks)


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("hidden", ["true", "false"])
def test_a_padded_vocabulary_has_no_probability_and_no_gradient(hidden: str, split: str, ranks: Ranks) -> None:
    assert_equal_to_one_process(f"ranks=2 layout:{split} model:vocab=61,split_hidden={hidden}", ranks)
    assert_equal_to_one_process(f"ranks=2 layout:{split} model:vocab=61,tied=true,split_hidden={hidden}", ranks)


@pytest.mark.parametrize("masked", ["uneven", "micro_batches", "ends"])
@pytest.mark.parametrize("layout", ["zero=1", *SPLITS, *PIPELINES])
def test_the_loss_is_the_mean_over_all_valid_tokens_wherever_they_are(layout: str, masked: str, ranks: Ranks) -> None:
    """Not a mean of ranks' means, nor of micro batches' means: these agree only while all have as many tokens.

    With masked ends a whole rank of a sequence has no token, with masked micro batches a whole data rank.
    """
    world = Combination.parse(f"ranks=1 layout:{layout}").layout
    assert_equal_to_one_process(
        f"ranks={2 * world.tensor * world.pipeline} layout:{layout} documents:masked={masked}", ranks
    )


@pytest.mark.parametrize("layout", ["", *SPLITS, *PIPELINES])
def test_a_batch_without_a_valid_token_changes_nothing_and_is_not_nan(layout: str, ranks: Ranks) -> None:
    world = Combination.parse(f"ranks=1 layout:{layout}").layout
    text = f"ranks={max(2, world.tensor * world.pipeline)} layout:{layout} documents:masked=all"
    case = Combination.parse(text).case()
    for step in record_of(case, ranks).steps:
        assert step.loss == step.grad_norm == 0.0
        assert not any(gradient.any() for gradient in step.gradients.values())
    assert_equal_to_one_process(text, ranks)


@pytest.mark.parametrize("pipeline", [*PIPELINES, "pipeline=4,schedule=ZBV"])
def test_a_tied_embedding_is_one_weight_on_both_ends_of_a_pipeline(pipeline: str, ranks: Ranks) -> None:
    """Its gradient is the sum of both ends', it counts once in the norm, and both copies stay the same."""
    stages = Combination.parse(f"ranks=1 layout:{pipeline}").layout.pipeline
    assert_equal_to_one_process(f"ranks={stages} layout:{pipeline} model:tied=true", ranks)
    assert_equal_to_one_process(f"ranks=8 layout:{pipeline} model:tied=true", ranks)


@pytest.mark.parametrize("split", SPLITS)
def test_a_tied_embedding_gets_the_gradients_of_both_its_uses_when_it_is_split(split: str, ranks: Ranks) -> None:
    assert_equal_to_one_process(f"ranks=2 layout:{split} model:tied=true", ranks)
    assert_equal_to_one_process(f"ranks=4 layout:{split},pipeline=2 model:tied=true,norm_head=true", ranks)


@pytest.mark.parametrize("micro_batches", [1, 2, 5])
@pytest.mark.parametrize("split", ["", *SPLITS])
def test_the_loss_is_scaled_once_and_not_by_micro_batches_or_ranks(
    split: str, micro_batches: int, ranks: Ranks
) -> None:
    assert_equal_to_one_process(f"ranks=2 layout:{split},zero=1 stepping:micro_batches={2 * micro_batches}", ranks)


@pytest.mark.parametrize("layout", ["zero=2", *SPLITS, *PIPELINES, "tensor=4,mode=isp,weight=2", "fsdp"])
def test_the_first_weights_are_the_same_bits_in_every_layout(layout: str, ranks: Ranks) -> None:
    case = Combination.parse(f"ranks=4 layout:{layout} model:kv_heads=2").case()
    first, expected = (run.initial for run in (record_of(case, ranks, 0), reference_of(case, ranks, 0)))
    assert first.keys() == expected.keys()
    for name in expected:
        assert np.array_equal(first[name], expected[name]), name


@pytest.mark.parametrize("documents", ["ragged=true", "ragged=false", "packed=false"])
@pytest.mark.parametrize("split", SEQUENCE_SPLITS)
def test_positions_go_on_where_the_sequence_is_cut(split: str, documents: str, ranks: Ranks) -> None:
    """The second half of a sequence does not begin at position 0, nor does a document that is cut in two."""
    assert_equal_to_one_process(f"ranks=2 layout:{split} documents:{documents}", ranks)


@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("split", [split.replace("tensor=2", "tensor=4") for split in SPLITS])
@pytest.mark.parametrize("family", ["INTERNLM2", "QWEN3", "QWEN2"])
def test_copies_of_a_key_value_head_share_their_gradient(family: str, split: str, kv_heads: int, ranks: Ranks) -> None:
    assert_equal_to_one_process(f"ranks=4 layout:{split} model:family={family},kv_heads={kv_heads}", ranks)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_recomputed_layers_of_a_pipeline_stage_are_those_of_the_model(pipeline: str, ranks: Ranks) -> None:
    """The first half of the layers, not of each stage; and a recomputed forward must not send or count anything."""
    assert_equal_to_one_process(f"ranks=2 layout:{pipeline} model:layers=4,checkpoint=0.5", ranks)
    assert_equal_to_one_process(f"ranks=4 layout:{pipeline},tensor=2,mode=msp model:layers=5,checkpoint=1", ranks)


@pytest.mark.parametrize("layout", ["zero=2", "zero=1", "fsdp", *SPLITS, *PIPELINES])
def test_fp32_norms_beside_bf16_weights_are_reduced_on_their_own(layout: str, ranks: Ranks) -> None:
    text = f"ranks=4 layout:{layout} model:dtype=bfloat16,fp32_norm,fp32_residual stepping:bucket=500,overlap_grad"
    if Combination.parse(text).problems():  # ZBH1 takes no overlap
        text = text.removesuffix(",overlap_grad")
    assert_equal_to_one_process(text, ranks)


@pytest.mark.parametrize("layout", [*SPLITS, "pipeline=2,schedule=ZBV"])
def test_large_gradients_of_a_tied_normalised_head_agree_unclipped(layout: str, ranks: Ranks) -> None:
    """Found by the fuzzer: rounding of the first step moves these weights, and later steps must allow for that."""
    world = Combination.parse(f"ranks=1 layout:{layout}").layout
    text = f"ranks={world.tensor * world.pipeline} layout:{layout} model:tied=true,norm_head=true stepping:clip=0"
    assert_equal_to_one_process(text, ranks)


@pytest.mark.parametrize("split", SPLITS)
def test_norms_of_many_query_heads_agree(split: str, ranks: Ranks) -> None:
    """Found by the fuzzer: the gradient of a query's norm is a sum over tokens and heads."""
    assert_equal_to_one_process(f"ranks=2 layout:{split} model:family=QWEN3,heads=16,kv_heads=2", ranks)
