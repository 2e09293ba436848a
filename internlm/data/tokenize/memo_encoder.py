"""Memoized byte-level BPE: the ids of the `tokenizers` library, several times faster.

A byte-level BPE tokenizer splits text into pre-tokens by a regular expression and encodes each independently, so the
ids of a pre-token can be cached; most of a text consists of a few frequent pre-tokens. Owns the checks that a tokenizer
and a text permit this; otherwise `build_memo_encoder` returns None, or the caller encodes the text with the library.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from itertools import chain
from typing import Any

# GPT-2, and the default of a ByteLevel pre-tokenizer.
_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SPLIT_PATTERNS = (
    _GPT2_PATTERN,
    # Llama 3.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    # Qwen 2 and 3.
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_CLASSES = (r"\p{L}", r"\p{N}", r"\s")
_PROBED = (range(0xD800), range(0xE000, 0x10000), range(0x1F000, 0x1FB00))
"""Code points whose classes are compared; texts with others (rare scripts) are left to the library."""
_FOLDED = "\u017f"
"""Long s, the one character outside ASCII that case folding maps to a letter of the contractions."""
_MAX_CACHED = 1 << 19
_MAX_CACHED_LENGTH = 64
_PROBE_TEXT = "It's  a\ttest,\r\n\n   I'LL say 12345 caf\u00e9s -- \u4f60\u597d!\n"


class MemoEncoder:
    """Encodes the texts that it `accepts`."""

    def __init__(self, tokenizer: Any, pattern: str, nfc: bool) -> None:
        import regex
        from tokenizers import pre_tokenizers

        self._find = regex.compile(pattern).findall
        self._nfc = nfc
        model, to_bytes = tokenizer.model, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

        def encode_pre_token(pre_token: str) -> tuple[int, ...]:
            return tuple(token.id for token in model.tokenize(to_bytes.pre_tokenize_str(pre_token)[0][0]))

        self._ids = _PreTokenIds(encode_pre_token)
        added = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        self._added = re.compile("|".join(map(re.escape, added))) if added else None
        self._unsafe = re.compile(f"[^{_ranges(_safe_characters())}]")

    def accepts(self, text: str) -> bool:
        """Whether `encode` gives the ids of the library for this text."""
        if self._added is not None and self._added.search(text):
            return False
        if text.isascii():
            return True
        return not self._unsafe.search(text) and (not self._nfc or unicodedata.is_normalized("NFC", text))

    def encode(self, text: str) -> list[int]:
        """Encode an accepted text."""
        return list(chain.from_iterable(map(self._ids.__getitem__, self._find(text))))


def build_memo_encoder(tokenizer: Any) -> MemoEncoder | None:
    """Build an encoder for a `tokenizers.Tokenizer`; None if it is not byte-level BPE of a known kind."""
    try:
        import regex  # noqa: F401
    except ImportError:
        return None
    description = json.loads(tokenizer.to_str())
    normalizer, model = description["normalizer"], description["model"]
    pattern = _pattern_of(description["pre_tokenizer"] or {})
    if pattern is None or model.get("type") != "BPE" or model.get("dropout"):
        return None
    if normalizer is not None and normalizer["type"] != "NFC":
        return None
    encoder = MemoEncoder(tokenizer, pattern, nfc=normalizer is not None)
    expected = tokenizer.encode(_PROBE_TEXT, add_special_tokens=False).ids
    if not encoder.accepts(_PROBE_TEXT) or encoder.encode(_PROBE_TEXT) != expected:
        return None
    return encoder


class _PreTokenIds(dict[str, tuple[int, ...]]):
    def __init__(self, encode_pre_token: Callable[[str], tuple[int, ...]]) -> None:
        super().__init__()
        self._encode_pre_token = encode_pre_token

    def __missing__(self, pre_token: str) -> tuple[int, ...]:
        ids = self._encode_pre_token(pre_token)
        if len(pre_token) <= _MAX_CACHED_LENGTH and len(self) < _MAX_CACHED:
            self[pre_token] = ids
        return ids


def _pattern_of(pre_tokenizer: dict[str, Any]) -> str | None:
    if pre_tokenizer.get("type") == "ByteLevel":
        is_default = not pre_tokenizer["add_prefix_space"] and pre_tokenizer["use_regex"]
        return _GPT2_PATTERN if is_default else None
    parts = pre_tokenizer.get("pretokenizers", [])
    if [part["type"] for part in parts] != ["Split", "ByteLevel"]:
        return None
    split, byte_level = parts
    pattern = split["pattern"].get("Regex")
    isolates = split["behavior"] == "Isolated" and not split["invert"]
    only_maps_bytes = not byte_level["add_prefix_space"] and not byte_level["use_regex"]
    return pattern if pattern in _SPLIT_PATTERNS and isolates and only_maps_bytes else None


def _safe_characters() -> set[str]:
    """Characters that the regular expressions of the library and those of `regex` put into the same classes.

    The two may follow different versions of Unicode.
    """
    import regex
    from tokenizers import Regex, pre_tokenizers

    probed = "".join(map(chr, chain(*_PROBED)))
    safe = set(probed) - set(_FOLDED)
    for name in _CLASSES:
        rest = pre_tokenizers.Split(Regex(name), "removed").pre_tokenize_str(probed)
        theirs = set(probed).difference(*(text for text, _ in rest))
        safe -= theirs ^ set(regex.findall(name, probed))
    return safe


def _ranges(characters: set[str]) -> str:
    """The inside of a regular expression's character class."""
    points = sorted(map(ord, characters))
    parts, first = [], points[0]
    for previous, point in zip(points, [*points[1:], -1], strict=True):
        if point != previous + 1:
            parts.append(f"{re.escape(chr(first))}-{re.escape(chr(previous))}")
            first = point
    return "".join(parts)
