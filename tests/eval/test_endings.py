"""Endings have the tokens that lm-evaluation-harness gives them."""

from __future__ import annotations

from typing import Any

import pytest
from lm_eval.api.model import TemplateLM

from internlm.eval.endings import EncodedEnding, encode_endings
from internlm.utils.errors import DataError


def encode(texts: list[str]) -> list[list[int]]:
    """A token for each character, one for "bc", and 1 for "<"."""
    found = []
    for text in texts:
        pieces = text.replace("bc", "\0")
        found.append([{"<": 1, "\0": 2}.get(piece, ord(piece)) for piece in pieces])
    return found


class Other(TemplateLM):
    """Their way from pairs to tokens."""

    eot_token_id = 1

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return encode([string])[0]

    def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> Any:
        return [(context, ending) for _, context, ending in requests]

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> Any: ...

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any: ...


class Request:
    def __init__(self, *args: str) -> None:
        self.args = args


@pytest.mark.parametrize("context", ["", "a", "ab", "ab ", "a\n\n", " a", "<a", "<"])
@pytest.mark.parametrize("ending", ["x", " y", "cd", "<z"])
def test_tokens_are_those_of_the_harness(context: str, ending: str) -> None:
    ((first, second),) = Other().loglikelihood([Request(context, ending)], disable_tqdm=True)  # type: ignore[list-item]
    (found,) = encode_endings([(context, ending)], encode, 1)
    assert (found.ids[: found.start], found.ids[found.start :]) == (first, second)
    assert found.is_joined == (context == "ab" and ending == "cd")


def test_white_space_alone_is_an_empty_context() -> None:
    """Where lm-evaluation-harness fails, without a token in front of the ending."""
    assert encode_endings([(" \n", "x")], encode, 1) == [EncodedEnding([1, 32, 10, 120], 1, False)]


def test_texts_begin_with_bos_once() -> None:
    found = encode_endings([("a", "b"), ("<a", "b"), ("", "<b"), ("", "b")], encode, 1, bos_id=1)
    assert [(each.ids, each.start) for each in found] == [
        ([1, 97, 98], 2),
        ([1, 97, 98], 2),
        ([1, 98], 1),
        ([1, 98], 1),
    ]


def test_an_empty_context_needs_a_token() -> None:
    with pytest.raises(DataError, match="the context is empty"):
        encode_endings([("", "x")], encode, None)
    assert encode_endings([("a", "x")], encode, None) == [EncodedEnding([97, 120], 1, False)]
