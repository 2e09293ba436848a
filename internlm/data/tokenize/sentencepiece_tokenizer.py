"""A SentencePiece model, run by its own library, with the special tokens of its folder.

Conversions of such a model to other formats change the ids of some texts (runs of spaces, line ends, tabs), so the
model file is authoritative. Special tokens that the folder names are split off first; SentencePiece encodes each text
between them separately, and so adds its space before each.
"""

from __future__ import annotations

import re
from itertools import groupby
from pathlib import Path

from internlm.data.tokenize.special_tokens import AddedToken, SpecialTokens, warn
from internlm.data.tokenize.token_bytes import TokenBytes, bytes_of_sentencepiece


class SentencePieceTokenizer:
    """The `sentencepiece` library as a `TextTokenizer`.

    Attributes:
        added: id -> token, for tokens that are matched literally in the text.

    Args:
        path: the .model file.
        special: the special tokens of the folder; without any, no text is encoded as a special token.

    Raises:
        DataError: bos or eos are named, but not in the vocabulary.
        RuntimeError: the file is not a SentencePiece model.
    """

    def __init__(self, path: Path, special: SpecialTokens) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = model = SentencePieceProcessor(model_file=str(path))
        size = model.vocab_size()
        self._pieces = [*model.id_to_piece(list(range(size)))]
        ids = {piece: id for id, piece in enumerate(self._pieces)}
        control = {id for id in range(size) if model.IsControl(id) or model.IsUnknown(id)}
        self.added = self._find_added(special, ids, control, path)
        self._pieces += [""] * (max(self.added, default=-1) + 1 - size)
        for id, token in self.added.items():
            self._pieces[id] = token.content
            ids[token.content] = id
        self.vocab_size = len(self._pieces)
        self.special_ids = frozenset(control | set(self.added))
        model_ids = {"bos_token": model.bos_id(), "eos_token": model.eos_id()}
        self.bos_id, self.eos_id = (
            special.token_id(key, ids, str(path)) if key in special.named else id if id >= 0 else None
            for key, id in model_ids.items()
        )
        # Alternatives are tried in order, so the longest comes first; group n of the pattern is the n-th of these.
        self._by_length = sorted(self.added, key=lambda id: -len(self.added[id].content))
        self._special = (
            re.compile("|".join(f"({_pattern(self.added[id])})" for id in self._by_length)) if self.added else None
        )

    @staticmethod
    def _find_added(
        special: SpecialTokens, ids: dict[str, int], control: set[int], path: Path
    ) -> dict[int, AddedToken]:
        """Id -> token, for all tokens to match in text; empty if the folder names no special token."""
        if not (special.named or special.added or special.others):
            return {}
        contents = {id: piece for piece, id in ids.items()}
        named = [AddedToken(content) for content in special.named.values() if content is not None]
        found = {id: AddedToken(contents[id]) for id in sorted(control)}
        added = {token.content for token in special.added.values()}
        for token in [*named, *special.others]:
            if token.content in ids:
                found[ids[token.content]] = token
            elif token.content not in added:
                warn(f"{path.parent}: the special token '{token.content}' has no id; it is encoded as ordinary text")
        return found | dict(special.added)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See `TextTokenizer`."""
        if self._special is None:
            return self._processor.encode(texts, out_type=int, num_threads=1)
        return [self._encode(text, self._special) for text in texts]

    def _encode(self, text: str, special: re.Pattern[str]) -> list[int]:
        ids: list[int] = []
        start = 0
        for match in special.finditer(text):
            ids += self._processor.encode(text[start : match.start()])
            assert match.lastindex is not None
            ids.append(self._by_length[match.lastindex - 1])
            start = match.end()
        return ids + self._processor.encode(text[start:])

    def decode(self, ids: list[int]) -> str:
        """See `TextTokenizer`."""
        parts = []
        for is_added, run in groupby(ids, key=self.added.__contains__):
            if is_added:
                parts += [self.added[id].content for id in run]
            else:
                parts.append(self._processor.decode(list(run)))
        return "".join(parts)

    def pieces(self) -> list[str]:
        """See `TextTokenizer`."""
        return list(self._pieces)

    def token_bytes(self) -> TokenBytes:
        """See `TextTokenizer`."""
        added = {id: (token.content, token.special) for id, token in self.added.items()}
        return bytes_of_sentencepiece(self._processor, self._pieces, added)


def _pattern(token: AddedToken) -> str:
    before, after = r"\s*" * token.lstrip, r"\s*" * token.rstrip
    content = re.escape(token.content)
    return f"{before}(?<!\\w){content}(?!\\w){after}" if token.single_word else f"{before}{content}{after}"
