"""Small SentencePiece models, trained on text that has what conversions get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import sentencepiece

CODE = (
    "def add(first, second):",
    "    if first:",
    "        return first + second",
    "    return None",
    "a text  with   runs    of spaces, numbers 12345 and words",
    "the model reads the text and the code, then the model writes a return",
)

# As the Llama and Mistral families train theirs: nothing normalised, unknown characters as bytes.
AS_LLAMA: dict[str, Any] = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "byte_fallback": True,
    "vocab_size": 340,
}
AS_T5: dict[str, Any] = {
    "model_type": "unigram",
    "normalization_rule_name": "nmt_nfkc",
    "remove_extra_whitespaces": True,
    "byte_fallback": False,
    "vocab_size": 80,
}


def train_sentencepiece(path: Path, **options: Any) -> Path:
    """Write a model to `path`; returns it."""
    corpus = path.with_suffix(".corpus")
    corpus.write_text("\n".join(CODE * 4))
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            input=str(corpus), model_writer=file, minloglevel=2, hard_vocab_limit=False, **{**AS_LLAMA, **options}
        )
    corpus.unlink()
    return path
