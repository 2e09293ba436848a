"""A tokenizer's fingerprint: equal for two tokenizers that give the same ids, whatever files they are read from.

It is kept with tokenized data, so that ids of one tokenizer are not mixed with, trained as or read as those of another.
Hashed is what a tokenizer does, not its files: a copy, another version of the file format and a faithful conversion
have the same fingerprint. How ordinary text that happens to spell a special token is read does not count.
"""

from __future__ import annotations

import hashlib
import json

from internlm.data.tokenize.probes import PROBE_TEXTS
from internlm.data.tokenize.text_tokenizer import TextTokenizer

_VERSION = 1
_SAMPLED_PIECES = 8192
_PIECES_A_TEXT = 8
_WORD_STARTS = "\u2581\u0120"
"""What SentencePiece and byte-level BPE write for a space at the start of a piece."""


def tokenizer_fingerprint(tokenizer: TextTokenizer) -> str:
    """A fingerprint such as "1-5f0c...-03ab...": version of this function, hash of the ids, hash of the ends.

    The ids are the vocabulary, the special tokens, and the ids of texts that show normalisation, splitting and merges:
    fixed ones, and runs of pieces from all over the vocabulary. The ends are the choice of bos and eos.
    """
    pieces = tokenizer.pieces()
    ordinary = [piece for id, piece in enumerate(pieces) if piece and id not in tokenizer.special_ids]
    sampled = ordinary[:: max(1, len(ordinary) // _SAMPLED_PIECES)]
    spaces = str.maketrans(dict.fromkeys(_WORD_STARTS, " "))
    runs = [
        "".join(sampled[first : first + _PIECES_A_TEXT]).translate(spaces)
        for first in range(0, len(sampled), _PIECES_A_TEXT)
    ]
    content = {
        "pieces": pieces,
        "special": sorted(tokenizer.special_ids),
        "ids": tokenizer.encode_batch([*PROBE_TEXTS, *runs]),
    }
    ends = [tokenizer.bos_id, tokenizer.eos_id]
    return f"{_VERSION}-{_hash(content)[:32]}-{_hash(ends)[:8]}"


def same_ids(fingerprint: str, other: str) -> bool:
    """Whether two tokenizers give equal texts the same ids; they may end documents with different tokens."""
    return fingerprint.rpartition("-")[0] == other.rpartition("-")[0]


def _hash(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
