"""Texts for comparing tokenizers, chosen where conversions between formats and libraries go wrong."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

_SPECIAL_TEXTS = 16


class Encoder(Protocol):
    """A tokenizer that can be compared."""

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode each text, without bos and eos."""


class Vocabulary(Protocol):
    """A tokenizer whose special tokens can be spelled."""

    special_ids: frozenset[int]

    def pieces(self) -> list[str]:
        """Return the vocabulary, by id."""


PROBE_TEXTS = (
    "Hello world",
    " leading space",
    "  two leading spaces",
    "trailing space ",
    "a  b   c    d        e",
    "   ",
    "\n",
    "\n\n\n",
    "one\ntwo\n\nthree\r\nfour",
    "\tone\t\ttwo",
    "def f(x):\n    if x:\n        return x\n\n\tpass\n",
    "\n    return",
    'for (int i = 0; i < 10; ++i) { s += "x\\n"; } // 0x1F',
    "It's 3.14, 12345 and 1,000,000; won't, I'LL, we've!?",
    "CamelCase snake_case kebab-case https://example.com/a?b=c&d=1",
    "caf\u00e9 cafe\u0301 na\u00efve \u00dcbergr\u00f6\u00dfe \ufb01 \u2460 \uff21\uff22\u3000\u00bd",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002 \u3053\u3093\u306b\u3061\u306f",
    "\uc548\ub155 \u0417\u0434\u0440\u0430\u0432 \u0645\u0631\u062d\u0628\u0627 \u0939\u093f\u0928\u094d\u0926\u0940",
    "\U0001f600 \U0001f469\u200d\U0001f4bb \u2581 \u0120 \u00a0 \u200b \ufeff \u2028",
    "\x00 \x07 \x7f",
)
"""Runs of spaces, line ends, tabs, code, numbers, composed and compatibility characters, scripts, joiners, controls."""


def first_difference(
    one: Encoder, other: Encoder, names: tuple[str, str], texts: Iterable[str] = PROBE_TEXTS
) -> str | None:
    """Describe the first text for which two tokenizers give different ids; None if there is none.

    Args:
        one, other: the tokenizers.
        names: their names in the description.
        texts: the texts to encode.
    """
    probes = list(texts)
    for text, ids, other_ids in zip(probes, one.encode_batch(probes), other.encode_batch(probes), strict=True):
        if ids != other_ids:
            return f"{text!r} is {ids} by {names[0]} and {other_ids} by {names[1]}"
    return None


def special_texts(tokenizer: Vocabulary) -> list[str]:
    """Texts that spell some special tokens of a tokenizer: at the start, inside a word, before and after a space."""
    pieces = tokenizer.pieces()
    special = [pieces[id] for id in sorted(tokenizer.special_ids) if pieces[id]]
    sampled = special[:: max(1, len(special) // _SPECIAL_TEXTS)]
    return [f"{piece}one{piece} two {piece}\n" for piece in sampled]
