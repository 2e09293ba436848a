"""The texts that a run writes while it trains are the same in every layout, and those of generation."""

from __future__ import annotations

import pytest
from helpers.resume import Ranks

# Before any fork.
import internlm.verify.warm_up  # noqa: F401
from internlm.apis.generation import generate
from internlm.apis.sampling import Sampling
from internlm.eval.sample_texts import SampleTextsHook
from internlm.eval.text_batches import TextBatches
from internlm.verify.case import Case, Combination
from internlm.verify.run import CaseRun, start_case

PROMPTS = [[5, 6, 7], [40], [11, 12, 13, 14, 15]]
NUM_TOKENS, NEW = 60, 6


def texts_of(case: Case) -> list[list[int]]:
    """What this rank's hook continues after two steps."""
    context = start_case(case)
    run = CaseRun(case, context)
    run.train(2)
    run.trainer.engine.optimizer.finish_gathering()
    data = case.config.data
    hook = SampleTextsHook(
        1,
        ["a", "b", "c"],
        PROMPTS,
        max_new_tokens=NEW,
        num_tokens=NUM_TOKENS,
        eos_ids=(),
        decode=str,
        batches=TextBatches(data.seq_len, data.micro_bsz, data.use_packed_dataset),
    )
    found = hook.continued(run.trainer)
    run.train(3)  # the run goes on
    context.close()
    return found


def generated(case: Case) -> list[list[int]]:
    """The same in one process, by the key-value cache."""
    context = start_case(case)
    run = CaseRun(case, context)
    run.train(2)
    run.trainer.engine.optimizer.finish_gathering()
    model = run.trainer.engine.chunks[0]
    texts = generate(model, PROMPTS, Sampling(max_new_tokens=NEW, num_tokens=NUM_TOKENS))  # type: ignore[arg-type]
    context.close()
    return [own[0].new_ids for own in texts]


MODEL = "model:dtype=float64"


@pytest.mark.parametrize(
    "line",
    [
        "ranks=1",
        "ranks=1 documents:packed=false",
        "ranks=2",
        "ranks=2 layout:fsdp",
        "ranks=2 layout:tensor=2,mode=mtp",
        "ranks=2 layout:tensor=2,mode=msp",
        "ranks=4 layout:tensor=2,mode=isp,weight=2,pipeline=2",
        "ranks=2 layout:context=2,context_cut=zigzag",
        "ranks=2 layout:pipeline=2,schedule=ZBV",
        "ranks=4 layout:tensor=2,mode=mtp,pipeline=2 documents:packed=false",
    ],
)
def test_every_layout_writes_what_one_process_generates(line: str, ranks: Ranks) -> None:
    case = Combination.parse(f"{line} {MODEL}").case()
    found = ranks(case.world_size).run(texts_of, case)
    assert all(each == found[0] for each in found)
    (expected,) = ranks(1).run(generated, case.reference())
    assert found[0] == expected
    assert all(len(ids) == NEW and max(ids) < NUM_TOKENS for ids in expected)


def test_texts_that_do_not_fit_into_one_micro_batch_are_split() -> None:
    assert TextBatches(8, 2, True).groups([7, 8, 2, 8, 6]) == [[0, 1], [2, 3, 4]]
    assert TextBatches(8, 2, False).groups([7, 8, 2, 8, 6]) == [[0, 1], [2, 3], [4]]
    assert TextBatches(8, 2, True).groups([]) == []
