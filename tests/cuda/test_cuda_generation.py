"""Texts and scores of a GPU are those of a CPU, with rows of unequal lengths in the cache and with windows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from helpers.model import tiny_model

from internlm.apis.generation import beam_search, generate
from internlm.apis.sampling import Sampling
from internlm.apis.scoring import Ending, score_endings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FORMS: list[tuple[str, dict[str, Any]]] = [("LLAMA2", {}), ("MISTRAL", {"sliding_window": 5}), ("QWEN3MOE", {})]
PROMPTS = [[1, 2, 3], [4], [9, 8, 7, 6, 5, 4, 3, 2, 1], [11] * 6]


@pytest.mark.parametrize(("family", "keys"), FORMS, ids=[family for family, _ in FORMS])
def test_texts_and_scores_equal_those_of_a_cpu(family: str, keys: dict[str, Any]) -> None:
    found = []
    for device in ("cpu", "cuda"):
        model: Any = tiny_model(family, seed=3, **keys).eval().to(device)
        texts = generate(model, PROMPTS, Sampling(max_new_tokens=9, top_logprobs=2), num_rows=3)
        beams = beam_search(model, PROMPTS[0], Sampling(max_new_tokens=6), num_beams=3, num_samples=2)
        scores = score_endings(model, [Ending([*prompt, 5, 6], len(prompt)) for prompt in PROMPTS])
        found.append((texts, beams, scores))
    (own, own_beams, own_scores), (texts, beams, scores) = found
    for (mine,), (truth,) in zip(texts, own, strict=True):
        assert mine.new_ids == truth.new_ids
        # Sums of fp32 in another order.
        values = [each.value for each in truth.logprobs]
        assert [each.value for each in mine.logprobs] == pytest.approx(values, abs=1e-4)
    assert [beam.ids for beam in beams] == [beam.ids for beam in own_beams]
    assert [each.value for each in scores] == pytest.approx([each.value for each in own_scores], abs=1e-4)


def test_samples_repeat_with_their_seed_whatever_is_beside_them() -> None:
    model: Any = tiny_model("LLAMA2", seed=3).eval().to("cuda")
    sampling = Sampling(max_new_tokens=12, do_sample=True, temperature=0.9, seed=5)
    together = generate(model, [PROMPTS[0], *PROMPTS], sampling)
    assert together[0][0].new_ids == generate(model, [PROMPTS[0]], sampling)[0][0].new_ids
    assert together[0][0].new_ids != together[1][0].new_ids
