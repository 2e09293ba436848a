"""One interface to the tokenizers that a user may have: tokenizer.json, a Hugging Face folder, a SentencePiece model.

Owns loading, and which ids begin and end a document. Imports no torch: tokenizing processes start fast.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Protocol

from internlm.data.tokenize.memo_encoder import MemoEncoder, build_memo_encoder
from internlm.utils.errors import DataError

_MEMO_PAYS_AT = 1 << 19
"""Characters after which building the memo encoder (a quarter of a second) is worth it."""
_KNOWN_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")
_KNOWN_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "[BOS]")


class TextTokenizer(Protocol):
    """What tokenizing needs of a tokenizer.

    Attributes:
        vocab_size: all ids are below it.
        bos_id, eos_id: the ids that begin and end a document; None if the tokenizer names none.
        special_ids: ids that no ordinary text gets: control tokens, unknown, and tokens added to the vocabulary.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    special_ids: frozenset[int]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text; adds no bos or eos."""

    def decode(self, ids: list[int]) -> str:
        """The text of ids, special tokens included."""

    def pieces(self) -> list[str]:
        """The vocabulary as the tokenizer spells it, by id; "" for an id without a piece. As long as `vocab_size`."""


def load_tokenizer(path: str | Path) -> TextTokenizer:
    """The tokenizer at `path`: a tokenizer.json, a Hugging Face folder, or a SentencePiece .model.

    Raises:
        DataError: there is none, or it cannot be read.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such tokenizer; expected a tokenizer.json, a Hugging Face folder or a .model file")
    try:
        if path.is_dir():
            if (path / "tokenizer.json").is_file():
                return _JsonTokenizer(path / "tokenizer.json")
            return _FolderTokenizer(path)
        if path.suffix == ".json":
            return _JsonTokenizer(path)
        if path.suffix == ".model":
            return _SentencePieceTokenizer(path)
    except Exception as error:  # each library raises its own kinds
        raise DataError(f"{path}: the tokenizer cannot be read: {error}") from error
    raise DataError(f"{path}: not a tokenizer.json, a Hugging Face folder or a SentencePiece .model file")


class _JsonTokenizer:
    """The `tokenizers` library; bos and eos come from tokenizer_config.json beside it, or from well-known names."""

    def __init__(self, path: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        config_path = path.with_name("tokenizer_config.json")
        config = json.loads(config_path.read_text("utf-8")) if config_path.is_file() else {}
        self.bos_id = self._special(config, "bos_token", _KNOWN_BOS)
        self.eos_id = self._special(config, "eos_token", _KNOWN_EOS)
        self.special_ids = frozenset(self._tokenizer.get_added_tokens_decoder())
        self._memo: MemoEncoder | None = None
        self._characters = 0

    def _special(self, config: dict[str, Any], key: str, known: tuple[str, ...]) -> int | None:
        if key in config:
            token = config[key]
            content = token["content"] if isinstance(token, dict) else token
            return None if content is None else self._tokenizer.token_to_id(content)
        specials = {token.content: id for id, token in self._tokenizer.get_added_tokens_decoder().items()}
        return next((specials[name] for name in known if name in specials), None)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See `TextTokenizer`."""
        before = self._characters
        self._characters += sum(map(len, texts))
        if before < _MEMO_PAYS_AT <= self._characters:
            self._memo = build_memo_encoder(self._tokenizer)
        memo = self._memo
        if memo is None:
            return self._encode_slowly(texts)
        return [memo.encode(text) if memo.accepts(text) else self._encode_slowly([text])[0] for text in texts]

    def _encode_slowly(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """See `TextTokenizer`."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def pieces(self) -> list[str]:
        """See `TextTokenizer`."""
        return _by_id(self._tokenizer.get_vocab(with_added_tokens=True), self.vocab_size)


class _SentencePieceTokenizer:
    """The `sentencepiece` library."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._processor = SentencePieceProcessor(model_file=str(path))
        self.vocab_size = self._processor.vocab_size()
        self.bos_id = self._processor.bos_id() if self._processor.bos_id() >= 0 else None
        self.eos_id = self._processor.eos_id() if self._processor.eos_id() >= 0 else None
        model = self._processor
        self.special_ids = frozenset(id for id in range(self.vocab_size) if model.IsControl(id) or model.IsUnknown(id))

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See `TextTokenizer`."""
        return self._processor.encode(texts, out_type=int, num_threads=1)

    def decode(self, ids: list[int]) -> str:
        """See `TextTokenizer`."""
        return self._processor.decode(ids)

    def pieces(self) -> list[str]:
        """See `TextTokenizer`."""
        return self._processor.id_to_piece(list(range(self.vocab_size)))


class _FolderTokenizer:
    """The `transformers` library, for a folder without a tokenizer.json."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        self.vocab_size = len(self._tokenizer)
        self.bos_id = self._tokenizer.bos_token_id
        self.eos_id = self._tokenizer.eos_token_id
        self.special_ids = frozenset(self._tokenizer.added_tokens_decoder) | frozenset(self._tokenizer.all_special_ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See `TextTokenizer`."""
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]

    def decode(self, ids: list[int]) -> str:
        """See `TextTokenizer`."""
        return str(self._tokenizer.decode(ids))

    def pieces(self) -> list[str]:
        """See `TextTokenizer`."""
        return _by_id(self._tokenizer.get_vocab(), self.vocab_size)


def _by_id(vocabulary: dict[Any, int], size: int) -> list[str]:
    pieces = [""] * size
    for piece, id in vocabulary.items():
        if id < size:
            pieces[id] = str(piece)
    return pieces
