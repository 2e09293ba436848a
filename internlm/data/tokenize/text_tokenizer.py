"""One interface to all kinds of tokenizers: tokenizer.json, Hugging Face folders, SentencePiece models.

Owns loading, and the choice of bos and eos. Imports no torch, so that tokenizing processes start fast.
"""

from __future__ import annotations

from multiprocessing import parent_process
from pathlib import Path
from typing import Any, Protocol

from internlm.data.tokenize.memo_encoder import MemoEncoder, build_memo_encoder
from internlm.data.tokenize.probes import PROBE_TEXTS, first_difference, special_texts
from internlm.data.tokenize.sentencepiece_tokenizer import SentencePieceTokenizer
from internlm.data.tokenize.special_tokens import SpecialTokens, own_code, read_special_tokens, warn
from internlm.data.tokenize.token_bytes import TokenBytes, bytes_of_json
from internlm.utils.errors import DataError

TOKENIZER_JSON, TOKENIZER_MODEL = "tokenizer.json", "tokenizer.model"

_MEMO_THRESHOLD = 1 << 19
"""Characters after which the memo encoder, which takes 0.25 s to build, is worth it."""
_KNOWN_EOS = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|eos|>", "[EOS]")
_KNOWN_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|bos|>", "[BOS]")


class TextTokenizer(Protocol):
    """A tokenizer, as tokenization and generation use it.

    Attributes:
        vocab_size: all ids are smaller.
        bos_id, eos_id: ids that start and end a document; None if the tokenizer names none.
        special_ids: ids that ordinary text does not produce: control tokens, unknown, and added tokens.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    special_ids: frozenset[int]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Encode each text, without bos and eos."""

    def decode(self, ids: list[int]) -> str:
        """Decode ids to text, with special tokens."""

    def pieces(self) -> list[str]:
        """Return the `vocab_size` pieces of the vocabulary as the tokenizer spells them; "" for an unused id."""

    def token_bytes(self) -> TokenBytes:
        """How many bytes of text each token stands for.

        Raises:
            DataError: this cannot be known by token; the message continues "the tokenizer: ...".
        """


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> TextTokenizer:
    """Load a tokenizer from a tokenizer.json, a Hugging Face folder, or a SentencePiece .model.

    In a folder, tokenizer.json takes precedence over a tokenizer.model of SentencePiece, and that over loading the
    folder with transformers. If the first two give different ids, a warning shows a text and the file that is used.

    Args:
        path: file or folder.
        trust_remote_code: whether to run custom code of a folder that has no other tokenizer.

    Raises:
        DataError: there is no tokenizer, it cannot be read, or bos or eos are named but not in its vocabulary.
    """
    path = Path(path)
    if not path.exists():
        raise DataError(f"{path}: no such tokenizer; expected a tokenizer.json, a Hugging Face folder or a .model file")
    try:
        if path.is_dir():
            return _load_folder(path, trust_remote_code)
        if path.suffix == ".json":
            return _JsonTokenizer(path, read_special_tokens(path.parent))
        if path.suffix == ".model":
            if not _is_sentencepiece(path):
                raise DataError(
                    f"{path}: not a SentencePiece model; give the tokenizer.json or the folder of this tokenizer"
                )
            return SentencePieceTokenizer(path, read_special_tokens(path.parent))
    except DataError:
        raise
    except Exception as error:  # each library raises its own kinds
        if "trust_remote_code" in str(error):
            raise DataError(_custom_code_refused(path, "named in its config.json")) from error
        raise DataError(f"{path}: the tokenizer cannot be read: {error}") from error
    raise DataError(f"{path}: not a tokenizer.json, a Hugging Face folder or a SentencePiece .model file")


def _load_folder(path: Path, trust_remote_code: bool) -> TextTokenizer:
    json_file, model_file = path / TOKENIZER_JSON, path / TOKENIZER_MODEL
    if not any(path.glob("*token*")) and not any(path.glob("*.json")) and not any(path.glob("*.model")):
        raise DataError(
            f"{path}: no tokenizer in this folder (tokenizer.json, tokenizer.model, or files of transformers); "
            "`internlm data tokenize TEXT --train 8192 --tokenizer NAME/tokenizer.json` trains one"
        )
    special = read_special_tokens(path)
    has_model = model_file.is_file() and _is_sentencepiece(model_file)
    if json_file.is_file():
        tokenizer = _JsonTokenizer(json_file, special)
        if has_model and parent_process() is None:
            probes = [*PROBE_TEXTS, *special_texts(tokenizer)]
            other = SentencePieceTokenizer(model_file, special)
            difference = first_difference(tokenizer, other, (TOKENIZER_JSON, TOKENIZER_MODEL), probes)
            if difference is not None:
                warn(f"{path}: {TOKENIZER_JSON} is used; {TOKENIZER_MODEL} is a different tokenizer: {difference}")
        return tokenizer
    if has_model:
        return SentencePieceTokenizer(model_file, special)
    return TransformersTokenizer(path, trust_remote_code)


def check_code(folder: Path, trust_remote_code: bool) -> None:
    """Refuse a folder whose tokenizer is custom code, unless that is trusted.

    Raises:
        DataError: the tokenizer is custom code, and `trust_remote_code` is False.
    """
    code = own_code(folder)
    if code is not None and not trust_remote_code:
        raise DataError(_custom_code_refused(folder, code))


def _custom_code_refused(folder: Path, code: str) -> str:
    return (
        f"{folder}: this tokenizer is custom code ({code}), which is not run by default: review it, then pass "
        "--trust-remote-code, or save the tokenizer as a tokenizer.json"
    )


def _is_sentencepiece(path: Path) -> bool:
    """Whether a .model file is of SentencePiece: some tokenizer.model files are lists of base64 tokens instead."""
    from sentencepiece import SentencePieceProcessor

    try:
        return SentencePieceProcessor().LoadFromFile(str(path))
    except RuntimeError:
        return False


class _JsonTokenizer:
    """A tokenizer of the `tokenizers` library; bos and eos come from the files beside it, or from well-known names."""

    def __init__(self, path: Path, special: SpecialTokens) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(path))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        added = {token.content: id for id, token in self._tokenizer.get_added_tokens_decoder().items()}
        missing = [token.content for id, token in special.added.items() if added.get(token.content) != id]
        if missing:
            warn(f"{path.parent}: {', '.join(missing)} added by other files, not in {path.name}: ordinary text")
        known_names = {"bos_token": _KNOWN_BOS, "eos_token": _KNOWN_EOS}
        self.bos_id, self.eos_id = (
            special.token_id(key, ids, str(path))
            if key in special.named
            else next((added[name] for name in known if name in added), None)
            for key, known in known_names.items()
        )
        self.special_ids = frozenset(self._tokenizer.get_added_tokens_decoder())
        self._memo: MemoEncoder | None = None
        self._num_characters = 0

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See `TextTokenizer`."""
        before = self._num_characters
        self._num_characters += sum(map(len, texts))
        if before < _MEMO_THRESHOLD <= self._num_characters:
            self._memo = build_memo_encoder(self._tokenizer)
        memo = self._memo
        if memo is None:
            return self._encode_with_library(texts)
        return [memo.encode(text) if memo.accepts(text) else self._encode_with_library([text])[0] for text in texts]

    def _encode_with_library(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """See `TextTokenizer`."""
        return self._tokenizer.decode(ids, skip_special_tokens=False)

    def pieces(self) -> list[str]:
        """See `TextTokenizer`."""
        return _by_id(self._tokenizer.get_vocab(with_added_tokens=True), self.vocab_size)

    def token_bytes(self) -> TokenBytes:
        """See `TextTokenizer`."""
        return bytes_of_json(self._tokenizer.to_str())


class TransformersTokenizer:
    """A tokenizer of `transformers`, for folders with neither a tokenizer.json nor a SentencePiece model."""

    def __init__(self, path: Path, trust_remote_code: bool) -> None:
        from transformers import AutoTokenizer

        check_code(path, trust_remote_code)
        self._tokenizer = AutoTokenizer.from_pretrained(
            path, local_files_only=True, trust_remote_code=trust_remote_code
        )
        self.vocab_size = len(self._tokenizer)
        self.bos_id = self._tokenizer.bos_token_id
        self.eos_id = self._tokenizer.eos_token_id
        self.special_ids = frozenset(self._tokenizer.added_tokens_decoder) | frozenset(self._tokenizer.all_special_ids)

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """See `TextTokenizer`."""
        # transformers fails on an empty list.
        return self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []

    def decode(self, ids: list[int]) -> str:
        """See `TextTokenizer`."""
        return str(self._tokenizer.decode(ids))

    def pieces(self) -> list[str]:
        """See `TextTokenizer`."""
        return _by_id(self._tokenizer.get_vocab(), self.vocab_size)

    def token_bytes(self) -> TokenBytes:
        """See `TextTokenizer`."""
        if not self._tokenizer.is_fast:
            raise DataError("it is Python code of transformers, which does not tell the bytes of a token")
        return bytes_of_json(self._tokenizer.backend_tokenizer.to_str())


def _by_id(vocabulary: dict[Any, int], size: int) -> list[str]:
    pieces = [""] * size
    for piece, id in vocabulary.items():
        if id < size:
            pieces[id] = str(piece)
    return pieces
