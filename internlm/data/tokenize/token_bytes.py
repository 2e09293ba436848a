"""How many bytes of text each token of a vocabulary stands for, for losses per byte.

The bytes are UTF-8, of the text as the tokenizer decodes it: special tokens have none, and a space that the tokenizer
adds in front of a text has none. Where this cannot be known by token, there is no table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from internlm.utils.errors import DataError

UNKNOWN = -1
"""Length of a token whose text is not known, such as `<unk>`."""

_SPACE = "\u2581"
"""The space of SentencePiece."""
_BYTE_PIECE = re.compile("<0x[0-9A-Fa-f]{2}>")
_SPACE_DECODERS = {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"}
_LOSSLESS_NORMALIZERS = {"Prepend", "Replace"}

AddedSpace = Literal["never", "document", "text"]
"""Where the tokenizer adds a space that is not part of the text: at the start of a document, or also after every
special token."""


@dataclass(frozen=True)
class TokenBytes:
    """The bytes of each token.

    Attributes:
        lengths: int64 [vocab], bytes within a text; 0 for special tokens, `UNKNOWN` where it is not known.
        special: bool [vocab].
        begins_with_space: bool [vocab].
        added_space: see `AddedSpace`.
        normalization: what changes texts before they are encoded, so that decoding does not restore them; "" if nothing
            does.
    """

    lengths: NDArray[np.int64]
    special: NDArray[np.bool_]
    begins_with_space: NDArray[np.bool_]
    added_space: AddedSpace
    normalization: str = ""

    def count(self, ids: NDArray[np.int64], is_counted: NDArray[np.bool_], *, starts_document: bool) -> int:
        """Bytes of the counted tokens among ids[1:]; the first one only precedes them.

        Args:
            ids: int64 [n], consecutive tokens of a document.
            is_counted: bool [n].
            starts_document: whether ids[0] is the first token of the document.

        Raises:
            DataError: a counted token has no known text.
        """
        tokens, before, counted = ids[1:], ids[:-1], is_counted[1:]
        if len(tokens) and int(ids.max()) >= len(self.lengths):
            raise DataError(f"token {int(ids.max())} is not in its vocabulary of {len(self.lengths)}")
        lengths = self.lengths[tokens]
        unknown = counted & (lengths == UNKNOWN)
        if unknown.any():
            raise DataError(f"the text of token {int(tokens[unknown][0])} is not known by its id alone")
        added = counted & self.begins_with_space[tokens] & self.special[before] & ~self.special[tokens]
        if self.added_space == "never":
            added[:] = False
        elif self.added_space == "document":
            added[0 if not starts_document else 1 :] = False
        return int(lengths[counted].sum()) - int(added.sum())

    def with_special(self, ids: NDArray[np.int64], image_token_id: int) -> NDArray[np.int64]:
        """The ids with a special token in the place of placeholders, which are no text either.

        Raises:
            DataError: there are placeholders, and the vocabulary has no special token.
        """
        is_placeholder = ids == image_token_id
        if not is_placeholder.any():
            return ids
        if not self.special.any():
            raise DataError("placeholders of pictures are treated as special tokens, of which it has none")
        return np.where(is_placeholder, np.flatnonzero(self.special)[0], ids)

    def check(self, ids: Sequence[int], decode: Decode) -> None:
        """Compare the table with decoded text.

        Args:
            ids: a document, or its first tokens.
            decode: decodes ids to text.

        Raises:
            DataError: they differ.
        """
        if max(ids, default=0) >= len(self.special):
            return  # `count` names the token
        is_first = True
        for is_special, group in groupby(ids, key=lambda id: bool(self.special[id])):
            run = np.array([*group], dtype=np.int64)
            text = "" if is_special else decode(run.tolist())
            # A cut character has no text.
            if is_special or "\ufffd" in text or (self.lengths[run] == UNKNOWN).any():
                is_first = is_first and is_special
                continue
            if is_first or self.added_space != "document":
                added = self.added_space != "never" and bool(self.begins_with_space[run[0]])
                length = int(self.lengths[run].sum()) - added
                if length != len(text.encode("utf-8", "surrogatepass")):
                    raise DataError(
                        f"{len(text.encode('utf-8', 'surrogatepass'))} bytes of decoded text are {length} bytes token "
                        f"by token, in {text[:40]!r}"
                    )
            is_first = False


class Decode(Protocol):
    """Decodes ids to text."""

    def __call__(self, ids: list[int]) -> str: ...


def bytes_of_json(spec: str, unknown: frozenset[int] = frozenset()) -> TokenBytes:
    """The bytes of a tokenizer of the `tokenizers` library.

    Args:
        spec: its JSON.
        unknown: further ids without a known text.

    Raises:
        DataError: its decoder joins tokens in a way that this function does not know.
    """
    tokenizer: dict[str, Any] = json.loads(spec)
    decoders = _parts(tokenizer["decoder"], "decoders")
    kinds = {part["type"] for part in decoders}
    is_byte_level = kinds == {"ByteLevel"}
    if not is_byte_level and (not kinds or not kinds <= _SPACE_DECODERS):
        raise DataError(f"its decoder ({', '.join(sorted(kinds)) or 'none'}) does not tell the bytes of a token")
    before = _parts(tokenizer["pre_tokenizer"], "pretokenizers")
    normalizers = _parts(tokenizer["normalizer"], "normalizers")
    if is_byte_level and any(part["type"] == "ByteLevel" and part["add_prefix_space"] for part in before):
        raise DataError("it adds a space in front of texts that have none, which ids do not tell from the others")
    vocabulary = _vocabulary(tokenizer["model"])
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    size = max([*vocabulary.values(), *added], default=-1) + 1
    pieces = [""] * size
    for piece, id in vocabulary.items():
        pieces[id] = piece
    if is_byte_level:
        table = _byte_level(pieces)
    else:
        table = _with_spaces(pieces, "ByteFallback" in kinds, _added_space(decoders, before, normalizers))
        unk = tokenizer["model"].get("unk_token")
        unk_id = tokenizer["model"].get("unk_id", vocabulary.get(unk))
        unknown = unknown | ({unk_id} if unk_id is not None else set())
    for id, token in added.items():
        table.special[id] = token["special"]
        table.begins_with_space[id] = False
        text = token["content"]
        # Decoders of bytes read other characters as bytes.
        table.lengths[id] = 0 if token["special"] else len(text) if text.isascii() else UNKNOWN
    for id in unknown:
        table.lengths[id] = UNKNOWN
    changes = sorted({part["type"] for part in normalizers} - _LOSSLESS_NORMALIZERS)
    return TokenBytes(table.lengths, table.special, table.begins_with_space, table.added_space, ", ".join(changes))


def bytes_of_sentencepiece(model: Any, pieces: Sequence[str], added: dict[int, tuple[str, bool]]) -> TokenBytes:
    """The bytes of a SentencePiece model.

    Args:
        model: SentencePieceProcessor.
        pieces: of all ids, those that are not in the model included.
        added: id -> (text, whether it is special), for tokens that are matched literally.

    Raises:
        DataError: the model marks ends of words.
    """
    size = model.vocab_size()
    encoded = model.encode("a", out_type=str)
    if encoded and encoded[-1].endswith(_SPACE):
        raise DataError("its pieces end with the space, so that decoded text depends on what follows")
    adds_space = bool(encoded) and encoded[0].startswith(_SPACE)
    table = _with_spaces(list(pieces), False, "text" if adds_space else "never")
    for id in range(size):
        if model.IsControl(id):
            table.lengths[id], table.special[id] = 0, True
        elif model.IsUnknown(id) or model.IsUnused(id):
            table.lengths[id] = UNKNOWN
        elif model.IsByte(id):
            table.lengths[id] = 1
    for id, (text, is_special) in added.items():
        is_unknown = id < size and model.IsUnknown(id)
        table.special[id] = is_special
        table.lengths[id] = UNKNOWN if is_unknown else 0 if is_special else len(text.encode())
        table.begins_with_space[id] = False
    changes = [
        what
        for what, text, other in (("runs of spaces", "a  a", "a a"), ("forms of characters", "\ufb01", "fi"))
        if model.encode(text) == model.encode(other)
    ]
    return TokenBytes(table.lengths, table.special, table.begins_with_space, table.added_space, ", ".join(changes))


def _byte_level(pieces: list[str]) -> TokenBytes:
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet = frozenset(ByteLevel.alphabet())
    lengths = [len(piece) if alphabet.issuperset(piece) else UNKNOWN for piece in pieces]
    return _table(lengths, [False] * len(pieces), "never")


def _with_spaces(pieces: list[str], has_byte_pieces: bool, added_space: AddedSpace) -> TokenBytes:
    lengths = [
        1 if has_byte_pieces and _BYTE_PIECE.fullmatch(piece) else len(piece.replace(_SPACE, " ").encode())
        for piece in pieces
    ]
    return _table(lengths, [piece.startswith(_SPACE) for piece in pieces], added_space)


def _table(lengths: list[int], begins_with_space: list[bool], added_space: AddedSpace) -> TokenBytes:
    return TokenBytes(
        np.array(lengths, dtype=np.int64),
        np.zeros(len(lengths), dtype=np.bool_),
        np.array(begins_with_space, dtype=np.bool_),
        added_space,
    )


def _added_space(
    decoders: list[dict[str, Any]], before: list[dict[str, Any]], normalizers: list[dict[str, Any]]
) -> AddedSpace:
    """Where a space is added to text, according to the parts of a tokenizer with the space of SentencePiece.

    Raises:
        DataError: encoder and decoder disagree.
    """
    schemes = [part.get("prepend_scheme", "always") for part in before if part["type"] == "Metaspace"]
    schemes += ["always" for part in normalizers if part["type"] == "Prepend" and part["prepend"] == _SPACE]
    encodes = next((scheme for scheme in schemes if scheme != "never"), "never")
    decodes = any(
        (part["type"] == "Strip" and part["start"] == 1 and part["stop"] == 0)
        or (part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never")
        for part in decoders
    )
    if decodes != (encodes != "never"):
        raise DataError("it adds a space in front of texts and does not remove it again, or the other way round")
    return {"never": "never", "first": "document", "always": "text"}[encodes]  # type: ignore[return-value]


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        return vocabulary
    return {piece: id for id, (piece, _) in enumerate(vocabulary)}  # Unigram: [piece, log probability]


def _parts(component: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    """The parts of a component, in order, without nesting."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for each in component[name] for part in _parts(each, name)]
