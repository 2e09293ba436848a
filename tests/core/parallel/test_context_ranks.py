"""Context ranks that compute a part of each row, against one process; attention has a window of one token.

So everything but attention is compared: gradients, sharded optimizer states, losses, and routers, whose losses, biases
and metrics depend on all tokens of a sample.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
from helpers.layouts import reference_of
from helpers.ranks import RankPool

from internlm.core.context.parallel_context import ParallelContext
from internlm.core.context.random import seed_everything
from internlm.data.batch import Batch, MicroBatch
from internlm.initialize.build import build_layout
from internlm.verify.batches import CaseBatches
from internlm.verify.case import Case, Combination, changed
from internlm.verify.record import RankRecord, join_ranks
from internlm.verify.report import judge
from internlm.verify.run import CaseRun

WINDOW = {"model.use_sliding_window": True, "model.sliding_window": 1}

MODELS = {
    "dense": "model:family=QWEN2,dtype=float64 documents:packed=false",
    "experts": (
        "model:family=QWEN3MOE,experts=4,router=sigmoid_grouped,dtype=float64 documents:packed=false,ragged=true"
    ),
}


class RowsOfContextRanks(CaseBatches):
    """This context rank's part of every row; the counts remain those of the sample."""

    def __init__(self, case: Case, context: ParallelContext) -> None:
        super().__init__(case, context.index("data"), context.size("data"))
        self._index, self._size = context.index("context"), context.size("context")

    def __iter__(self) -> Iterator[Batch]:
        for batch in super().__iter__():
            yield replace(batch, micro_batches=[self._cut(micro) for micro in batch.micro_batches])

    def _cut(self, micro: MicroBatch) -> MicroBatch:
        return micro.copied(lambda tensor: tensor.chunk(self._size, dim=1)[self._index].contiguous())


def run_on_context_ranks(case: Case, size: int, head_first: bool) -> RankRecord:
    """A case, each rank of which is a group of `size` context ranks."""
    seed_everything(case.config.seed)
    layout = build_layout(case.config, case.world_size)
    layout = replace(layout, world_size=layout.world_size * size, context=size, head_first=head_first)
    context = ParallelContext.create(layout)
    run = CaseRun(case, context)
    run.trainer.train_loader = RowsOfContextRanks(case, context)
    run.train(2)
    context.close()
    return run.record


@pytest.mark.parametrize(
    ("layout", "size", "head_first"),
    [
        ("ranks=1", 2, True),
        ("ranks=1", 4, True),
        ("ranks=2", 2, True),
        ("ranks=2 layout:fsdp", 2, True),
        ("ranks=2 layout:tensor=2,mode=mtp", 2, True),
        ("ranks=2 layout:tensor=2,mode=msp", 2, True),
        ("ranks=2 layout:tensor=2,mode=fsp,fsdp", 2, True),
        ("ranks=2 layout:pipeline=2", 2, True),
        ("ranks=2 layout:tensor=2,mode=isp,weight=2", 2, True),
        ("ranks=2 layout:tensor=2,mode=isp,weight=2", 2, False),
    ],
)
@pytest.mark.parametrize("model", MODELS)
def test_tokens_of_a_sample_on_several_context_ranks(
    layout: str, size: int, head_first: bool, model: str, ranks: Callable[[int], RankPool]
) -> None:
    if model == "experts" and "fsdp" in layout:
        pytest.skip("experts are sharded as other weights are")
    case = Combination.parse(f"{layout} {MODELS[model]},masked=uneven").case()
    case = replace(case, config=changed(case.config, WINDOW))
    world = case.world_size * size
    found = join_ranks(ranks(world).run(run_on_context_ranks, case, size, head_first))
    verdict = judge(case, found, reference_of(case, ranks))
    assert verdict.is_equal, verdict.explain()
