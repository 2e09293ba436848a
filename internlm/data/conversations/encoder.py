"""Turns rows of conversations into token ids and a loss mask.

Pure: a row in, ids and mask out. Must not know files, ranks or packing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, pairwise
from pathlib import Path
from typing import Any

from internlm.data.conversations.answer_spans import LEARN, MASK_METHODS, find_answers
from internlm.data.conversations.chat_template import ChatTemplate, load_chat_template
from internlm.data.conversations.image_parts import with_image_markers
from internlm.data.conversations.row_forms import FORMS, Completion, read_row
from internlm.data.tokenize.text_tokenizer import TextTokenizer
from internlm.utils.errors import DataError, nearest

_MAX_SEARCH = 32
"""Tokens in which the border of an answer is searched."""


@dataclass(frozen=True)
class ConversationOptions:
    """How rows become ids and masks.

    Attributes:
        form: one of FORMS; None detects it from the columns of each row.
        learn: "all": every assistant message has loss; "last": only the last one.
        mask: "marks": answers are what the template marks with {% generation %}; "prefix": the exact difference of
            prefixes; "auto": marks if the template has them.
        chat_template: file with a template; None takes that of the tokenizer.
        image_marker: text that a part {"type": "image"} of a message becomes; None: such a part is an error.

    Raises:
        DataError: an attribute has an unknown value.
    """

    form: str | None = None
    learn: str = "all"
    mask: str = "auto"
    chat_template: str | None = None
    image_marker: str | None = None

    def __post_init__(self) -> None:
        for name, known in (("form", (None, *FORMS)), ("learn", LEARN), ("mask", MASK_METHODS)):
            value = getattr(self, name)
            if value not in known:
                names = [str(each) for each in known if each is not None]
                raise DataError(f"{name} = {value!r}: expected one of {', '.join(names)}.{nearest(str(value), names)}")


@dataclass(frozen=True)
class MaskedTokens:
    """A tokenized row.

    Attributes:
        ids: token ids.
        loss_mask: whether each token contributes loss; as long as `ids`.
    """

    ids: list[int]
    loss_mask: list[bool]

    @property
    def num_labels(self) -> int:
        """Number of labels: the first token of a document is never one."""
        return sum(self.loss_mask[1:])


class ConversationEncoder:
    """Encodes rows.

    Ids are those of the whole rendered text, which has all special tokens. A row is verified: each border of an answer
    must be one of tokens, which holds if the ids of the parts between borders are those of the text, or if the ids of
    the text up to the border, or ids that decode to it, are a prefix of them.

    A completion without messages has no template: prompt and completion are encoded separately, as generation does,
    and the eos of the tokenizer follows.

    Args:
        tokenizer: the tokenizer.
        template: its chat template; None only serves completions.
        options: how rows are read.
    """

    def __init__(self, tokenizer: TextTokenizer, template: ChatTemplate | None, options: ConversationOptions) -> None:
        self._tokenizer, self._template, self._options = tokenizer, template, options

    def encode(self, row: Any, place: str) -> MaskedTokens:
        """Encode a row; without an assistant message, no token has loss.

        Args:
            row: the columns of the row.
            place: file and position, for errors.

        Raises:
            DataError: the row is malformed, the template refuses it, or its answers cannot be separated exactly.
        """
        if self._options.image_marker is not None:
            row = with_image_markers(row, self._options.image_marker)
        found = read_row(row, self._options.form, place)
        if isinstance(found, Completion):
            return self._encode_completion(found, place)
        if self._template is None:
            raise DataError(f"{place} is a conversation, which needs a chat template: name one (--chat-template FILE)")
        text, spans = find_answers(found, self._template, place, learn=self._options.learn, method=self._options.mask)
        return self._mask(text, spans, place)

    def _encode_completion(self, found: Completion, place: str) -> MaskedTokens:
        if self._tokenizer.eos_id is None:
            raise DataError(f"{place}: the tokenizer names no eos token, so a model cannot learn where an answer ends")
        prompt, completion = self._tokenizer.encode_batch([found.prompt, found.completion])
        # An empty completion is a missing answer, from which not even its end is learned.
        has_loss = bool(completion)
        ids = [*prompt, *completion, self._tokenizer.eos_id]
        return MaskedTokens(ids, [False] * len(prompt) + [has_loss] * (len(completion) + 1))

    def _mask(self, text: str, spans: Sequence[tuple[int, int]], place: str) -> MaskedTokens:
        borders = sorted({0, len(text)}.union(*spans))
        ids, *parts = self._tokenizer.encode_batch([text, *(text[a:b] for a, b in pairwise(borders))])
        positions = [0, *accumulate(map(len, parts))]
        if list(chain.from_iterable(parts)) != ids:
            positions = [0, *(self._position(ids, text, border, place) for border in borders[1:-1]), len(ids)]
        position_of = dict(zip(borders, positions, strict=True))
        loss_mask = [False] * len(ids)
        for start, end in spans:
            first, last = position_of[start], position_of[end]
            loss_mask[first:last] = [True] * (last - first)
        return MaskedTokens(ids, loss_mask)

    def _position(self, ids: list[int], text: str, border: int, place: str) -> int:
        """The number of ids whose text is exactly `text[:border]`."""
        [prefix] = self._tokenizer.encode_batch([text[:border]])
        if ids[: len(prefix)] == prefix:
            return len(prefix)
        # Alone, white space at the end may become other tokens than before a word, although none crosses the border.
        common = next(i for i, (a, b) in enumerate(zip([*ids, None], prefix, strict=False)) if a != b)
        for position in range(common, min(common + _MAX_SEARCH, len(ids)) + 1):
            if self._tokenizer.decode(ids[:position]) == text[:border]:
                return position
        raise DataError(
            f"{place}: a token crosses the border of an answer, between {text[max(0, border - 16) : border]!r} "
            f"and {text[border : border + 16]!r}: strip white space from the answers, or make the template end "
            "its header and the answer with a special token"
        )


def load_template_for(
    options: ConversationOptions, tokenizer_path: Path, *, trust_remote_code: bool = False
) -> ChatTemplate | None:
    """Load the chat template that rows need; None for completions with a tokenizer that has no template.

    Raises:
        DataError: see `load_chat_template`.
    """
    file = Path(options.chat_template) if options.chat_template is not None else None
    try:
        return load_chat_template(tokenizer_path, file, trust_remote_code=trust_remote_code)
    except DataError:
        # Completions need none; one of messages is refused with its row.
        if options.form == "prompt_completion" and file is None:
            return None
        raise
