"""Fingerprints of tokenizers: equal for two tokenizers that produce the same ids, whatever their files.

Tokenized data carries the fingerprint, so that the ids of different tokenizers are not mixed. It is a hash of what a
tokenizer does, not of its files: a copy, another version of the file format and a lossless conversion have the same
fingerprint. It ignores how ordinary text that spells a special token is encoded.
"""

from __future__ import annotations

import hashlib
import json

from internlm.data.tokenize.probes import PROBE_TEXTS
from internlm.data.tokenize.text_tokenizer import TextTokenizer

_VERSION = 1
_SAMPLED_PIECES = 8192
_PIECES_PER_TEXT = 8
_WORD_STARTS = "\u2581\u0120"
"""Characters by which SentencePiece and byte-level BPE denote a leading space."""


def tokenizer_fingerprint(tokenizer: TextTokenizer) -> str:
    """Compute a fingerprint such as "1-5f0c...-03ab...": version of this function, hash of ids, hash of bos and eos.

    The hash of ids covers the vocabulary, the special tokens, and the ids of texts that expose normalization,
    pre-tokenization and merges: the fixed `PROBE_TEXTS`, and concatenated pieces from all parts of the vocabulary.
    """
    pieces = tokenizer.pieces()
    ordinary = [piece for id, piece in enumerate(pieces) if piece and id not in tokenizer.special_ids]
    sampled = ordinary[:: max(1, len(ordinary) // _SAMPLED_PIECES)]
    spaces = str.maketrans(dict.fromkeys(_WORD_STARTS, " "))
    runs = [
        "".join(sampled[first : first + _PIECES_PER_TEXT]).translate(spaces)
        for first in range(0, len(sampled), _PIECES_PER_TEXT)
    ]
    content = {
        "pieces": pieces,
        "special": sorted(tokenizer.special_ids),
        "ids": tokenizer.encode_batch([*PROBE_TEXTS, *runs]),
    }
    return f"{_VERSION}-{_hash(content)[:32]}-{_hash([tokenizer.bos_id, tokenizer.eos_id])[:8]}"


def same_ids(fingerprint: str, other: str) -> bool:
    """Whether two fingerprints are of the same ids; bos and eos may differ."""
    return fingerprint.rpartition("-")[0] == other.rpartition("-")[0]


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
