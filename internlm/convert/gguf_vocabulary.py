"""The tokenizer of a GGUF file, made of a tokenizer.json with BPE (byte-level, or as SentencePiece) or of a .model.

llama.cpp has tokenizers of its own. It splits text before byte-level BPE by rules that a file can only name, so the
rule of a tokenizer.json is looked up by its pattern, and an unknown one is refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from internlm.convert.tokenizer_files import TokenizerFiles
from internlm.data.tokenize.sentencepiece_tokenizer import SentencePieceTokenizer
from internlm.data.tokenize.text_tokenizer import TOKENIZER_JSON, TOKENIZER_MODEL
from internlm.utils.errors import ConfigError
from internlm.utils.logging import get_logger

logger = get_logger(__name__)

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
"""Types of tokens, numbered as in SentencePiece."""
_SENTENCEPIECE_BPE = 2
_ADDED_SCORE = -1000.0

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_PRE_TOKENIZERS = {
    (f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}{{1,3}}|{_SYMBOLS}|{_LINES}", True): "llama-bpe",
    (f"{_CONTRACTIONS}|{_WORDS}|\\p{{N}}|{_SYMBOLS}|{_LINES}", False): "qwen2",
}
"""Pattern, and whether a word that is a token is taken without merges -> name in llama.cpp."""
GPT2 = "gpt-2"
"""The rule of a ByteLevel pre-tokenizer alone, as of the tokenizers that this project trains."""


@dataclass(frozen=True)
class GgufVocabulary:
    """A tokenizer as llama.cpp reads it.

    Attributes:
        model: "gpt2" (byte-level BPE) or "llama" (SentencePiece).
        pre: name of the pre-tokenizer.
        tokens: by id, one for each row of the embedding.
        types: of the tokens.
        scores: of the tokens, for "llama".
        merges: pairs of pieces with a space between, for "gpt2".
        space_prefix: whether a space is put before a text.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str] | None
    space_prefix: bool


def gguf_vocabulary(exported: TokenizerFiles, num_rows: int, pre: str | None = None) -> GgufVocabulary:
    """The vocabulary, padded to the rows of the embedding.

    Args:
        exported: the tokenizer of the run.
        num_rows: rows of the embedding.
        pre: name of the pre-tokenizer of byte-level BPE; None: by its pattern.

    Raises:
        ConfigError: llama.cpp does not have this kind of tokenizer, or there are more tokens than rows.
    """
    tokenizer = exported.tokenizer
    if tokenizer is None:
        raise ConfigError("llama.cpp needs a tokenizer: give that of the training data with --tokenizer PATH")
    if tokenizer.vocab_size > num_rows:
        raise ConfigError(
            f"{exported.where}: the tokenizer has {tokenizer.vocab_size:,} tokens, the embedding only {num_rows:,} "
            "rows: it is not the one that made the training data"
        )
    if isinstance(tokenizer, SentencePieceTokenizer):
        found = _from_sentencepiece(exported, tokenizer)
    elif TOKENIZER_JSON in exported.files:
        found = _from_json(exported, json.loads(exported.files[TOKENIZER_JSON]), pre)
    else:
        raise _refusal(exported, "it is code, and neither a tokenizer.json nor a SentencePiece model")
    padding = range(len(found.tokens), num_rows)
    # An unused id within the vocabulary needs a name of its own, too.
    found.tokens[:] = [token or f"[PAD{id}]" for id, token in enumerate(found.tokens)]
    found.tokens.extend(f"[PAD{id}]" for id in padding)
    found.types.extend(UNUSED for _ in padding)
    if found.scores is not None:
        found.scores.extend(_ADDED_SCORE for _ in padding)
    if padding:
        logger.info(
            "the embedding has %d more rows than the tokenizer has tokens: named [PAD...], unused", len(padding)
        )
    return found


def _from_json(exported: TokenizerFiles, values: dict[str, Any], pre: str | None) -> GgufVocabulary:
    model = values["model"]
    kind = model.get("type")
    if kind != "BPE":
        raise _refusal(exported, f"its tokenizer.json is of type {kind}, not BPE")
    tokenizer = exported.tokenizer
    assert tokenizer is not None
    added = {token["id"]: token for token in values.get("added_tokens", ())}
    tokens = tokenizer.pieces()
    types = [NORMAL if token else UNUSED for token in tokens]
    for id, token in added.items():
        tokens[id], types[id] = token["content"], CONTROL if token["special"] else USER_DEFINED
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    if _names(values.get("decoder")) & {"ByteFallback"} or model.get("byte_fallback"):
        return _sentencepiece_like(exported, values, tokens, types, merges)
    pre = pre or _pre_tokenizer(exported, values)
    normalizers = _names(values.get("normalizer"))
    if normalizers - {"Sequence", "NFC"}:
        raise _refusal(exported, f"its normalizer {', '.join(sorted(normalizers))} is not that of byte-level BPE")
    if normalizers:
        logger.warning("llama.cpp does not normalize text (NFC): decomposed characters give other tokens there")
    return GgufVocabulary("gpt2", pre, tokens, types, None, merges, space_prefix=False)


def _pre_tokenizer(exported: TokenizerFiles, values: Mapping[str, Any]) -> str:
    steps = values.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    level = [step for step in steps if step.get("type") == "ByteLevel"]
    if len(level) != 1 or level[0].get("add_prefix_space"):
        raise _refusal(exported, "its pre-tokenizer is not a ByteLevel without add_prefix_space")
    patterns = [step for step in steps if step.get("type") != "ByteLevel"]
    ignores_merges = bool(values["model"].get("ignore_merges"))
    if not patterns and level[0].get("use_regex", True) and not ignores_merges:
        return GPT2
    pattern = str(patterns[0].get("pattern", {}).get("Regex")) if len(patterns) == 1 else ""
    name = _PRE_TOKENIZERS.get((pattern, ignores_merges))
    if name is None or patterns[0].get("behavior") != "Isolated":
        raise _refusal(
            exported,
            f"the pre-tokenizer of llama.cpp for it is not known (pattern {pattern!r}). Name one with --pre-tokenizer, "
            "and let --check compare the tokens",
        )
    return name


def _sentencepiece_like(
    exported: TokenizerFiles, values: Mapping[str, Any], tokens: list[str], types: list[int], merges: list[str]
) -> GgufVocabulary:
    """A SentencePiece model that was converted to a tokenizer.json: the order of merges becomes scores."""
    normalizer = values.get("normalizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    if values.get("pre_tokenizer") or kinds not in (["Prepend", "Replace"], ["Replace"]):
        raise _refusal(exported, f"its normalizer ({', '.join(kinds) or 'none'}) is not that of a SentencePiece model")
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault(merge.replace(" ", "", 1), rank)
    scores = [-float(ranks.get(token, len(merges))) for token in tokens]
    for id, token in enumerate(tokens):
        if _is_byte(token):
            types[id] = BYTE
        if token == values["model"].get("unk_token"):
            types[id] = UNKNOWN
    return GgufVocabulary("llama", "default", tokens, types, scores, None, space_prefix="Prepend" in kinds)


def _from_sentencepiece(exported: TokenizerFiles, tokenizer: SentencePieceTokenizer) -> GgufVocabulary:
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(exported.files[TOKENIZER_MODEL])
    rules, trained = proto.normalizer_spec, proto.trainer_spec
    reasons = {
        "its SentencePiece model is not BPE": trained.model_type != _SENTENCEPIECE_BPE,
        "its SentencePiece model has no bytes for unknown characters": not trained.byte_fallback,
        "its SentencePiece model normalizes text": bool(rules.precompiled_charsmap),
        "its SentencePiece model removes extra white space": rules.remove_extra_whitespaces,
    }
    for reason, applies in reasons.items():
        if applies:
            raise _refusal(exported, reason)
    tokens = tokenizer.pieces()
    types = [int(piece.type) for piece in proto.pieces]
    scores = [piece.score for piece in proto.pieces]
    for id in range(len(types), len(tokens)):
        types.append(USER_DEFINED if tokens[id] else UNUSED)
        scores.append(_ADDED_SCORE)
    for id, token in tokenizer.added.items():
        if types[id] in (NORMAL, USER_DEFINED):
            types[id] = CONTROL if token.special else USER_DEFINED
    return GgufVocabulary("llama", "default", tokens, types, scores, None, space_prefix=rules.add_dummy_prefix)


def _is_byte(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _names(step: Mapping[str, Any] | None) -> set[str]:
    """The types of a step of a tokenizer.json and of those within it."""
    if not step:
        return set()
    inner = [*step.get("normalizers", ()), *step.get("decoders", ()), *step.get("pretokenizers", ())]
    return {step["type"]}.union(*map(_names, inner))


def _refusal(exported: TokenizerFiles, reason: str) -> ConfigError:
    return ConfigError(f"{exported.where}: llama.cpp has no tokenizer like this: {reason}")
