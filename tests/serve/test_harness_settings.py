"""Each of a task's `generation_kwargs` has its effect, a notice that it has none, or an error."""

from __future__ import annotations

from typing import Any

import pytest

from internlm.apis.sampling import Sampling
from internlm.serve.harness_settings import GenerationSettings, read_generation_settings
from internlm.utils.errors import ConfigError


def read(**given: Any) -> GenerationSettings:
    return read_generation_settings(given, eos_ids=(1,), num_tokens=9, seed=5)


def sampling(**keys: Any) -> Sampling:
    return Sampling(**{"max_new_tokens": 256, "eos_ids": (1,), "num_tokens": 9, "seed": 5, **keys})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"max_gen_toks": 7}, {"max_new_tokens": 7}),
        ({"max_new_tokens": 7, "max_tokens": 7}, {"max_new_tokens": 7}),
        ({"max_completion_tokens": 7}, {"max_new_tokens": 7}),
        ({"do_sample": False, "temperature": 0.0, "num_beams": 1}, {}),
        ({"temperature": 0}, {}),
        ({"temperature": 0.5}, {"do_sample": True, "temperature": 0.5}),
        ({"do_sample": True}, {"do_sample": True}),
        (
            {"do_sample": True, "temperature": 2, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
            {"do_sample": True, "temperature": 2, "top_k": 3, "top_p": 0.5, "min_p": 0.1},
        ),
        (
            {"repetition_penalty": 1.5, "presence_penalty": 0.1, "frequency_penalty": 0.2},
            {"repetition_penalty": 1.5, "presence_penalty": 0.1, "frequency_penalty": 0.2},
        ),
    ],
)
def test_keys_become_settings(given: dict[str, Any], expected: dict[str, Any]) -> None:
    found = read(until=["\n"], **given)
    assert found == GenerationSettings(sampling(**expected), ("\n",), ())


@pytest.mark.parametrize(
    ("given", "stops", "notice"),
    [
        ({}, (), "until has no text"),
        ({"until": []}, (), "until has no text"),
        ({"until": ""}, (), "until has no text"),
        ({"until": "Q:"}, ("Q:",), None),
        ({"until": ["Q:", ""]}, ("Q:",), "until has an empty text"),
        ({"until": ["Q:"], "do_sample": False, "temperature": 0.8}, ("Q:",), "temperature = 0.8 has no effect"),
        ({"until": ["Q:"], "top_p": 0.9, "top_k": 4}, ("Q:",), "top_k = 4 and top_p = 0.9 has no effect"),
    ],
)
def test_what_has_no_effect_is_said(given: dict[str, Any], stops: tuple[str, ...], notice: str | None) -> None:
    found = read(**given)
    assert found.stops == stops and found.sampling == sampling()
    assert len(found.notices) == (notice is not None)
    assert all(text.startswith(str(notice)) for text in found.notices)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_lenght": 3, "stop": "x"}, "has 'max_lenght', 'stop'; supported are until"),
        ({"max_length": 3}, "has 'max_length'"),
        ({"max_gen_toks": 3, "max_tokens": 4}, "several lengths, {'max_gen_toks': 3, 'max_tokens': 4}"),
        ({"max_gen_toks": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"max_gen_toks": "many"}, "max_gen_toks = 'many': must be a number"),
        ({"num_beams": 4}, "num_beams = 4: beam search is not supported"),
        ({"until": 3}, "until = 3"),
        ({"until": [3]}, r"until = \[3\]"),
        ({"do_sample": "yes"}, "do_sample = 'yes': must be true or false"),
        ({"temperature": "hot"}, "temperature = 'hot': must be a number"),
        ({"do_sample": True, "temperature": 0}, "temperature = 0: must be at least"),
        ({"do_sample": True, "top_p": 2}, "top_p = 2: must be above 0"),
    ],
)
def test_what_cannot_be_done_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**given)
