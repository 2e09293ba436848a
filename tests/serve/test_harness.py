"""A checkpoint as lm-evaluation-harness sees it: what is cut, what is refused, what is drawn."""

from __future__ import annotations

from typing import Any

import pytest
from commands.test_chat_command import make_folder
from lm_eval.api.instance import Instance

from internlm.apis.engine import Prompt, Text
from internlm.apis.scoring import score_tokens
from internlm.serve import harness
from internlm.serve.harness import HarnessModel
from internlm.serve.language_model import LanguageModel, load_language_model
from internlm.utils.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    """One token a byte, without bos and eos."""
    folder = make_folder(tmp_path_factory.mktemp("harness"))
    return load_language_model(str(folder / "run"), device="cpu")


def ending(context: str, text: str) -> Instance:
    return Instance("loglikelihood", {}, (context, text), 0, ("quiz", 3, 1))


def prompt(text: str, **settings: Any) -> Instance:
    return Instance("generate_until", {}, (text, {"until": ["\n"], "max_gen_toks": 5, **settings}), 0, ("quiz", 3, 1))


def test_the_beginning_of_a_long_context_is_cut_and_counted(language: LanguageModel) -> None:
    model = HarnessModel(language, max_length=8)
    long, short, fits = "0123456789", "89", "345678"
    found = model.loglikelihood([ending(long, "abc"), ending(short, "abc"), ending(fits, "abc")])
    assert (model.counts.scored, model.counts.cut) == (3, 1)
    ids = language.encode("456789abc")
    assert found[0][0] == pytest.approx(sum(each.value for each in score_tokens(language.model, ids)[-3:]))
    # Nine tokens, of which the model reads eight.
    assert HarnessModel(language, max_length=7).loglikelihood([ending(fits, "abc")]) != found[2:]
    assert HarnessModel(language, max_length=80).loglikelihood([ending(fits, "abc")])[0] == pytest.approx(found[2])
    with pytest.raises(DataError, match=r"the ending 'abcdefghi'\.\.\. has 9 tokens, more than the 8 that"):
        model.loglikelihood([ending("x", "abcdefghi")])


def test_endings_without_a_token_are_named(language: LanguageModel) -> None:
    model = HarnessModel(language, max_length=8)
    with pytest.raises(DataError, match="task quiz, document 3: the ending '' has no token of its own"):
        model.loglikelihood([ending("a", "b"), ending("a", "")])
    with pytest.raises(DataError, match="the context is empty, and the tokenizer has no bos or eos"):
        model.loglikelihood([ending("", "b")])
    with pytest.raises(DataError, match="no bos or eos to put in front of a text"):
        model.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("abc",), 0, ("quiz", 3, 1))])
    with pytest.raises(DataError, match="document 3: the prompt is empty"):
        model.generate_until([prompt("")])


def test_tokens_over_the_border_of_context_and_ending_are_counted(
    language: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def encode(texts: list[str]) -> list[list[int]]:
        return [[ord(letter) % 64 for letter in text.replace("bc", "B")] for text in texts]

    monkeypatch.setattr(language.tokenizer, "encode_batch", encode)
    model = HarnessModel(language, max_length=8)
    model.loglikelihood([ending("ab", "cd"), ending("ab", "d"), ending("b", "cc")])
    assert (model.counts.scored, model.counts.joined) == (3, 2)


def test_the_beginning_of_a_long_prompt_is_cut_and_counted(language: LanguageModel) -> None:
    model = HarnessModel(language, max_length=8)
    assert model.generate_until([prompt("012345"), prompt("345")]) == model.generate_until([prompt("345")]) * 2
    assert (model.counts.generated, model.counts.cut_prompts) == (3, 1)
    with pytest.raises(ConfigError, match="task quiz: generation_kwargs asks for 8 new tokens, which leaves no room"):
        model.generate_until([prompt("a", max_gen_toks=8)])
    with pytest.raises(ConfigError, match="task quiz: generation_kwargs has 'best_of'"):
        model.generate_until([prompt("a", best_of=2)])


def test_nothing_is_written_behind_a_stop_text(language: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[bool] = []

    def write(model: Any, prompts: list[list[int]], sampling: Any, *, on_token: Any, **options: Any) -> None:
        text = Text(Prompt(prompts[0]), sampling)
        for id in language.encode("a\n"):
            text.new_ids.append(id)
            answers.append(on_token(text))

    monkeypatch.setattr(harness, "generate", write)
    assert HarnessModel(language, max_length=8).generate_until([prompt("345")]) == ["a"]
    assert answers == [False, True]


def test_sampled_texts_depend_on_the_seed_alone(language: LanguageModel) -> None:
    """Neither on the texts beside them nor on other tasks; repeated prompts give several texts."""
    requests = [prompt(text, do_sample=True, max_gen_toks=9) for text in ("ab", "ab", "c", "defg")]
    found = HarnessModel(language, max_length=32, seed=1).generate_until(requests)
    assert found[0] != found[1]
    other = Instance("generate_until", {}, ("x", {"do_sample": True}), 0, ("other", 0, 1))
    for rows in (1, 3):
        model = HarnessModel(language, max_length=300, seed=1, num_rows=rows)
        assert model.generate_until([other, *requests])[1:] == found
    assert HarnessModel(language, max_length=32, seed=2).generate_until(requests) != found


def test_conversations_are_rendered_by_the_template(language: LanguageModel) -> None:
    template = language.chat_template()
    model = HarnessModel(language, max_length=32, template=template)
    messages = [{"role": "system", "content": "be"}, {"role": "user", "content": "one"}]
    assert model.apply_chat_template(messages) == "[system]be[user]one[a]"
    assert model.chat_template(True) == template.source
    assert model.tokenizer_name == f"tokenizer__{template.fingerprint}"
    assert HarnessModel(language, max_length=32).tokenizer_name == "tokenizer"
    with pytest.raises(ConfigError, match="begins the answer itself"):
        model.apply_chat_template(messages, add_generation_prompt=False)


def test_texts_begin_with_bos_if_asked(language: LanguageModel) -> None:
    model = HarnessModel(language, max_length=32, bos_id=7)
    assert model.tok_encode("ab")[0] == 7 and len(model.tok_encode("ab")) == 3
    assert len(model.tok_encode("ab", add_special_tokens=False)) == 2
    ids = [7, *language.encode("abc")]
    assert model.loglikelihood([ending("ab", "c")])[0][0] == pytest.approx(score_tokens(language.model, ids)[-1].value)


def test_each_token_of_a_long_text_is_scored_once(language: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window begins with the last token of the one in front of it; the last window is full."""
    monkeypatch.setattr(HarnessModel, "prefix_token_id", 7)
    ids = language.encode("0123456789")

    def score(windows: list[tuple[list[int], int]]) -> float:
        scores = ((score_tokens(language.model, window), count) for window, count in windows)
        return sum(each.value for found, count in scores for each in found[-count:])

    request = Instance("loglikelihood_rolling", {}, ("0123456789",), 0, ("quiz", 3, 1))
    windows = [([7, *ids[:4]], 4), (ids[3:8], 4), (ids[5:], 2)]
    for length, expected in ((4, windows), (10, [([7, *ids], 10)])):
        assert HarnessModel(language, max_length=length).loglikelihood_rolling([request]) == [
            pytest.approx(score(expected))
        ]
    monkeypatch.setattr(HarnessModel, "prefix_token_id", ids[0])
    (found,) = HarnessModel(language, max_length=10).loglikelihood_rolling([request])
    assert found == pytest.approx(score([(ids, 9)]))
