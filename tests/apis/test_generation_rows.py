"""Rows of the engine while texts start, end and are cancelled beside each other."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers.llama_pair import llama_pair
from helpers.model import tiny_model

from internlm.apis.engine import GenerationEngine, Prompt, Text, append_tokens
from internlm.apis.generation import beam_search, generate
from internlm.apis.sampling import Sampling

VOCAB = 97


@pytest.fixture(scope="module")
def model() -> Any:
    return llama_pair()[0].eval()


def make_text(length: int, max_new_tokens: int) -> Text:
    ids = torch.randint(VOCAB, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    return Text(Prompt(ids), Sampling(max_new_tokens=max_new_tokens))


def run(engine: GenerationEngine) -> None:
    while not engine.is_idle:
        engine.step()


def test_texts_that_end_while_a_prompt_is_computed_in_pieces_change_no_other(model: Any) -> None:
    """A prompt of n tokens takes n / 2 steps, so the rows in front of it become free in between."""
    engine = GenerationEngine(model, num_rows=3, max_length=40, chunk=2)
    texts = [make_text(length, count) for length, count in ((3, 4), (12, 9), (15, 2), (5, 12), (14, 7), (9, 20))]
    cancelled = make_text(13, 5)
    for text in (*texts[:3], cancelled, *texts[3:]):
        engine.submit(text)
    while len(cancelled.new_ids) < 2:
        engine.step()
    engine.cancel(cancelled)
    run(engine)
    for text in texts:
        assert text.new_ids == generate(model, [text.prompt.ids], text.sampling)[0][0].new_ids
        assert len(text.new_ids) == text.sampling.max_new_tokens


@pytest.mark.parametrize("moves", [False, True])
def test_who_has_the_row_of_a_spoiled_prompt_next_is_not_spoiled(moves: bool) -> None:
    """Neither if that prompt was cancelled before its end, nor if it had moved to another row by then."""
    model = tiny_model("LLAMA2", seed=3).eval()
    spoiled = 5
    with torch.no_grad():
        model.tok_embeddings.weight[spoiled] = math.nan
    engine = GenerationEngine(model, num_rows=3, max_length=40, chunk=2)
    long, short = (Text(Prompt([1] * 9), Sampling(max_new_tokens=count)) for count in (30, 5 if moves else 20))
    bad = Text(Prompt([2] * 5 + [spoiled] + [4] * 11), Sampling(max_new_tokens=1))
    for text in (long, short):
        engine.submit(text)
    while not short.new_ids:
        engine.step()
    engine.submit(bad)
    for _ in range(5):
        engine.step()
    assert (short.finish_reason == "length") is moves and bad.finish_reason is None
    engine.cancel(bad)
    later = [Text(Prompt([7]), Sampling(max_new_tokens=3)) for _ in range(2)]
    for text in later:
        engine.submit(text)
    run(engine)
    assert [text.finish_reason for text in (long, *later)] == ["length"] * 3


def test_prompts_start_together_within_a_budget_and_are_never_cut_differently(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a text would differ in its last bits with the texts that come at the same time."""
    engine = GenerationEngine(model, num_rows=6, max_length=40, chunk=8)
    texts = [make_text(length, 9) for length in (3, 4, 5, 19, 2)]
    for text in texts:
        engine.submit(text)
    pieces: list[list[int]] = []
    compute = engine._compute_piece
    monkeypatch.setattr(
        engine,
        "_compute_piece",
        lambda prompt, piece, row: pieces[-1].append(len(piece)) or compute(prompt, piece, row),
    )
    while any(not text.new_ids for text in texts):
        pieces.append([])
        engine.step()
    assert pieces == [[3, 4], [5], [8], [8], [3, 2]]
    run(engine)
    for text in texts:
        assert text.new_ids == generate(model, [text.prompt.ids], text.sampling)[0][0].new_ids


def test_a_text_that_starts_later_shares_the_prompt_alone_with_one_that_has_grown(model: Any) -> None:
    engine = GenerationEngine(model, num_rows=2, max_length=40)
    beside, first = make_text(5, 3), make_text(9, 12)
    later = Text(first.prompt, first.sampling)
    for text in (beside, first, later):
        engine.submit(text)
    while beside.finish_reason is None:
        engine.step()
    assert len(first.new_ids) > 1 and not later.new_ids
    run(engine)
    assert later.new_ids == first.new_ids


def test_keys_that_depend_on_the_length_of_a_prompt_are_computed_at_once() -> None:
    keys = {"rope_scaling": {"type": "dynamic", "factor": 2.0}, "max_position_embeddings": 8}
    model = tiny_model("LLAMA2", dtype="torch.float64", **keys).eval()
    text = make_text(30, 1)
    engine = GenerationEngine(model, num_rows=1, max_length=40, chunk=4)
    engine.submit(text)
    run(engine)
    with torch.no_grad():
        whole = model.logits(model(torch.tensor([text.prompt.ids]), torch.arange(30)[None])[:, -1])[0]
    torch.testing.assert_close(text.prompt.logits, whole.float())


def test_a_prompt_with_images_is_computed_at_once(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = GenerationEngine(model, num_rows=1, max_length=40, chunk=2)
    images = torch.ones(1)
    passes: list[tuple[int, list[str]]] = []

    def append(ids: list[list[int]], first: int, inputs: dict[str, Any]) -> torch.Tensor:
        passes.append((len(ids[0]), list(inputs)))
        return append_tokens(model, engine._cache, ids, first, row_by_row=False)

    monkeypatch.setattr(engine, "_append", append)
    engine.submit(Text(Prompt([1] * 9, {"images": images}), Sampling(max_new_tokens=2)))
    run(engine)
    assert passes == [(9, ["images"]), (1, [])]


def model_with_few_places() -> Any:
    """Its experts have a capacity, which drops tokens."""
    experts = {"capacity_factor": 0.5, "eval_capacity_factor": 0.5, "min_capacity": 0}
    keys = {"num_experts": 4, "top_k": 2, "moe_type": "GShard", "moe_layer_kwargs": experts}
    return tiny_model("INTERNLM_MoE", dtype="torch.float64", **keys).eval()


def test_texts_do_not_compete_for_the_places_of_experts() -> None:
    model = model_with_few_places()
    prompts = [make_text(5 + 3 * number, 12).prompt.ids for number in range(6)]
    sampling = Sampling(max_new_tokens=12)
    alone = [generate(model, [prompt], sampling)[0][0].new_ids for prompt in prompts]
    together = generate(model, prompts, sampling, num_rows=6)
    assert [texts[0].new_ids for texts in together] == alone
    # A piece of a prompt is no text either.
    engine = GenerationEngine(model, num_rows=6, max_length=40, chunk=2)
    texts = [Text(Prompt(prompt), sampling) for prompt in prompts]
    for text in texts:
        engine.submit(text)
    run(engine)
    assert [text.new_ids for text in texts] == alone


def test_beams_do_not_compete_for_the_places_of_experts() -> None:
    """The score of a beam is the sum of what each token is worth with a pass of its own."""
    model = model_with_few_places()
    prompt = make_text(5, 6).prompt.ids
    sampling = Sampling(max_new_tokens=6)
    for beam in beam_search(model, prompt, sampling, num_beams=4, num_samples=4, length_penalty=0.0):
        cache = model.make_cache(1, len(prompt) + len(beam.ids))
        score, piece = 0.0, list(prompt)
        with torch.no_grad():
            for id in beam.ids:
                hidden = append_tokens(model, cache, [piece], row_by_row=True)
                score += float(model.logits(hidden[:, -1])[0].log_softmax(0)[id])
                piece = [id]
        # The logits are rounded to fp32 in beam search.
        assert beam.score == pytest.approx(score, abs=1e-5)
