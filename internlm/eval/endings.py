"""Tokenizes endings together with what is in front of them, by the rules of lm-evaluation-harness.

White space at the end of a context belongs to the ending. The tokens of the ending are those of context and ending
together behind as many as the context alone has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from internlm.utils.errors import DataError

Encode = Callable[[list[str]], list[list[int]]]
"""Texts -> tokens of each, without bos and eos."""


@dataclass(frozen=True)
class EncodedEnding:
    """A tokenized text, of which the tokens from `start` on are an ending.

    Attributes:
        ids: of the text.
        start: at least 1. Equal to `len(ids)` if the ending has no token of its own.
        is_joined: a token of context and ending together covers the border. The context alone has other tokens, which
            are in front of the ending, as they are in lm-evaluation-harness; together they spell another text.
    """

    ids: list[int]
    start: int
    is_joined: bool


def encode_endings(
    pairs: Sequence[tuple[str, str]], encode: Encode, prefix_id: int | None, *, bos_id: int | None = None
) -> list[EncodedEnding]:
    """Tokenize pairs of a context and an ending.

    Args:
        pairs: a context without more than white space is empty.
        encode: of the tokenizer.
        prefix_id: the token that stands for an empty context, unless the ending begins with it.
        bos_id: the token that texts with a context begin with; not added where they have it already. None: none.

    Raises:
        DataError: a context is empty, and there is no `prefix_id`.
    """
    contexts = [context.rstrip() for context, _ in pairs]
    if prefix_id is None and "" in contexts:
        raise DataError("the context is empty, and the tokenizer has no bos or eos to stand for it")
    texts = list(dict.fromkeys([context for context in contexts if context] + [a + b for a, b in pairs]))
    ids_of = dict(zip(texts, encode(texts), strict=True))
    found = []
    for context, (before, ending) in zip(contexts, pairs, strict=True):
        whole = ids_of[before + ending]
        if not context:
            assert prefix_id is not None
            found.append(EncodedEnding(with_first(prefix_id, whole), 1, False))
            continue
        first = with_first(bos_id, ids_of[context])
        whole = with_first(bos_id, whole)
        found.append(EncodedEnding([*first, *whole[len(first) :]], len(first), whole[: len(first)] != first))
    return found


def with_first(id: int | None, ids: list[int]) -> list[int]:
    """The tokens behind `id`, unless they begin with it, or it is None."""
    return ids if id is None or ids[:1] == [id] else [id, *ids]
