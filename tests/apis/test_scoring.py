"""Scores of packed texts are those of each text alone, whatever is beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from helpers.model import DECODERS, tiny_model
from torch.nn import functional

from internlm.apis import scoring
from internlm.apis.engine import NonFiniteError
from internlm.apis.scoring import Ending, EndingScore, score_endings, score_tokens
from internlm.utils.errors import ConfigError

VOCAB = 97


def make_endings(seed: int = 0) -> list[Ending]:
    """Texts of many lengths, some of which differ in their last token or in where they start."""
    generator = torch.Generator().manual_seed(seed)
    texts = [torch.randint(VOCAB, (length,), generator=generator).tolist() for length in (2, 9, 30, 5, 2, 17, 9, 12)]
    endings = [Ending(ids, max(1, len(ids) // 2)) for ids in texts]
    first = texts[2]
    return [*endings, Ending([*first[:-1], 3], 29), Ending([*first[:-1], 4], 1), Ending(first, 1)]


def alone(model: Any, ending: Ending) -> float:
    return math.fsum(each.value for each in score_tokens(model, ending.ids)[ending.start - 1 :])


def values(scores: Sequence[EndingScore]) -> list[float]:
    return [score.value for score in scores]


@pytest.mark.parametrize("name", DECODERS)
def test_packed_texts_score_as_alone(name: str) -> None:
    model = tiny_model(name, dtype="torch.float64").eval()
    endings = make_endings()
    for size in (1, 40, 4096):
        # Sums of up to 30 numbers around 5, whose relative rounding is 2^-53 times some hundred products.
        assert values(score_endings(model, endings, tokens_at_once=size)) == pytest.approx(
            [alone(model, ending) for ending in endings], rel=1e-12
        )


@pytest.mark.parametrize(
    "keys",
    [{"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}, {"sliding_window": 4}],
)
def test_packed_texts_score_as_alone_whatever_their_positions_mean(keys: dict[str, Any]) -> None:
    """Frequencies that depend on the length of a text, and windows."""
    model = tiny_model("MISTRAL" if "sliding_window" in keys else "LLAMA2", dtype="torch.float64", **keys).eval()
    endings = make_endings()
    assert values(score_endings(model, endings)) == pytest.approx([alone(model, each) for each in endings], rel=1e-12)


def test_scores_in_fp32() -> None:
    """Against float64: a log-probability in fp32 is off by some 2^-24 times its logits, which are below 10."""
    model = tiny_model("LLAMA2").eval()
    exact = tiny_model("LLAMA2", dtype="torch.float64").eval()
    exact.load_state_dict({name: tensor.double() for name, tensor in model.state_dict().items()})
    endings = make_endings()
    for ending, score in zip(endings, score_endings(model, endings), strict=True):
        ids = torch.tensor([list(ending.ids)])
        with torch.no_grad():
            logits = exact.logits(exact(ids, torch.arange(ids.shape[1])[None]))[0]
        logprobs = functional.log_softmax(logits, dim=1)
        wanted = ids[0, ending.start :]
        rows = logprobs[ending.start - 1 : -1]
        assert score.value == pytest.approx(float(rows.gather(1, wanted[:, None]).sum()), abs=1e-5)
        assert score.is_greedy == bool((rows.argmax(dim=1) == wanted).all())


def test_a_greedy_ending_is_one_that_the_model_would_write() -> None:
    """Among the tokens of the tokenizer: the padding of the vocabulary is never written."""
    model = tiny_model("LLAMA2").eval()
    with torch.no_grad():
        model.output.weight[90] *= 50
    ids = [1, 2, 3]
    with torch.no_grad():
        logits = model.logits(model(torch.tensor([ids]), torch.arange(3)[None]))[0, -1]
    if int(logits.argmax()) != 90:
        with torch.no_grad():
            model.output.weight[90] *= -1
    best, second = int(logits.abs().argmax()), int(logits[:90].argmax())
    assert best == 90
    endings = [Ending([*ids, best], 3), Ending([*ids, second], 3)]
    assert [each.is_greedy for each in score_endings(model, endings)] == [True, False]
    limited = score_endings(model, endings, num_tokens=90)
    assert [each.is_greedy for each in limited] == [False, True]
    # The padding begins behind the last token.
    assert [each.is_greedy for each in score_endings(model, endings, num_tokens=91)] == [True, False]
    # What a token is worth does not depend on which may be written.
    assert values(limited) == values(score_endings(model, endings))


def test_of_equal_tokens_the_first_is_the_one_that_the_model_would_write() -> None:
    model = tiny_model("LLAMA2").eval()
    with torch.no_grad():
        model.output.weight.zero_()
    endings = [Ending([1, 2, id], 2) for id in (0, 1, 96)]
    assert [each.is_greedy for each in score_endings(model, endings)] == [True, False, False]


def test_passes_and_logits_are_as_large_as_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("LLAMA2", dtype="torch.float64").eval()
    endings = [Ending(list(range(length)), 1) for length in (30, 9, 17, 12)]
    expected = [alone(model, ending) for ending in endings]
    monkeypatch.setattr(scoring, "LOGITS_AT_ONCE", 5 * VOCAB)
    passes: list[int] = []
    blocks: list[int] = []
    logits_of = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden: blocks.append(len(hidden)) or logits_of(hidden))
    model.register_forward_pre_hook(lambda module, args: passes.append(args[0].numel()))
    assert values(score_endings(model, endings, tokens_at_once=45)) == pytest.approx(expected, rel=1e-12)
    assert passes == [29 + 16, 11 + 8] and max(blocks) == 5 and sum(blocks) == sum(passes)


def test_experts_with_a_capacity_see_one_text_at_a_time() -> None:
    """Tokens of other texts would take the places of an expert."""
    experts = {"capacity_factor": 0.5, "eval_capacity_factor": 0.5, "min_capacity": 0}
    keys = {"num_experts": 4, "top_k": 2, "moe_type": "GShard", "moe_layer_kwargs": experts}
    model = tiny_model("INTERNLM_MoE", dtype="torch.float64", **keys).eval()
    endings = make_endings()
    expected = [alone(model, each) for each in endings]
    assert values(score_endings(model, endings)) == pytest.approx(expected, rel=1e-12)


def test_equal_inputs_are_computed_once() -> None:
    model = tiny_model("LLAMA2").eval()
    seen: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    context = list(range(10))
    counts: list[int] = []
    score_endings(model, [Ending([*context, id], 10) for id in range(4)], on_scored=counts.append)
    assert seen == [(1, 10)] and counts == [4]


def test_what_cannot_be_scored_is_refused() -> None:
    model = tiny_model("LLAMA2").eval()
    for ids, start in (([1, 2], 0), ([1, 2], 2), ([1], 1), ([], 1)):
        with pytest.raises(ConfigError, match=f"an ending of {len(ids)} tokens cannot start at token {start}"):
            score_endings(model, [Ending(ids, start)])
    with pytest.raises(ConfigError, match="tokens_at_once = 0"):
        score_endings(model, [], tokens_at_once=0)
    assert score_endings(model, []) == []
    with torch.no_grad():
        model.tok_embeddings.weight[5] = math.nan
    with pytest.raises(NonFiniteError, match="NaN"):
        score_endings(model, [Ending([1, 2], 1), Ending([5, 2], 1)])
