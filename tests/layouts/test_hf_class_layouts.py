"""Classes of transformers train in every layout that they allow as in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.hf_runs import hf_case
from helpers.layouts import STEPS, record_of, reference_of
from helpers.resume import Ranks

from internlm.verify.report import judge

pytest.importorskip("transformers")

ISP, FSDP, MTP = "ranks=2 layout:tensor=2,mode=isp,weight=2", "ranks=2 layout:fsdp", "ranks=2 layout:tensor=2,mode=mtp"

CLASSES = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi",
    "olmo2",
    "glm4",
    "smollm3",
    "gpt_neox",
    "gpt2",
    "granite",
    "cohere",
    "qwen3_moe",
    "gpt_oss",
)


@pytest.mark.parametrize("line", [ISP, FSDP, MTP])
@pytest.mark.parametrize("family", CLASSES)
def test_a_layout_trains_as_one_process_does(family: str, line: str, ranks: Ranks, tmp_path: Path) -> None:
    dtype = " model:dtype=float64" if family in ("qwen3_moe", "gpt_oss") else ""
    case = hf_case(f"{line}{dtype}", family, tmp_path)
    verdict = judge(case, record_of(case, ranks, STEPS), reference_of(case, ranks, STEPS))
    assert verdict.is_equal, verdict.explain()


OTHERS = (
    ("qwen3", "ranks=2 layout:pipeline=2"),
    # Its activation function has weights, which no plan mentions, between layers that the plan splits.
    ("apertus", "ranks=2 layout:tensor=2,mode=mtp model:dtype=float64"),
    ("exaone4", "ranks=2 layout:tensor=2,mode=mtp model:dtype=float64"),
    ("exaone4", "ranks=2 layout:context=2 model:dtype=float64"),
    ("gemma", "ranks=2 layout:pipeline=2"),
    ("llama", "ranks=4 layout:pipeline=2,schedule=ZBV"),
    ("gemma3_text", "ranks=2 layout:context=2"),
    ("qwen2", "ranks=4 layout:tensor=2,mode=mtp,pipeline=2 model:checkpoint=1"),
    ("llama", "ranks=4 layout:tensor=2,mode=isp,weight=2,context=2 model:checkpoint=1,save_policy=attention"),
    ("smollm3", "ranks=2 layout:fsdp model:checkpoint=1 documents:packed=false"),
    ("phi", "ranks=4 layout:tensor=2,mode=isp,weight=4 documents:packed=false,masked=none,ragged=false"),
    ("mistral", "ranks=4 layout:zero=2 model:dtype=bfloat16 stepping:overlap_grad,overlap_param"),
)


@pytest.mark.parametrize(("family", "line"), OTHERS)
def test_other_layouts(family: str, line: str, ranks: Ranks, tmp_path: Path) -> None:
    case = hf_case(line, family, tmp_path)
    verdict = judge(case, record_of(case, ranks, STEPS), reference_of(case, ranks, STEPS))
    assert verdict.is_equal, verdict.explain()
