"""Trains a byte-level BPE tokenizer on text and writes it so that `tokenizers` and `transformers` load it.

Owns the shape of our own tokenizers: id 0 is padding (the id InternEvo never trains on), id 1 ends a document.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from internlm.data.permutation import permute
from internlm.data.tokenize.text_inputs import TextOptions, plan_shards, read_documents
from internlm.utils.errors import DataError

PAD_TOKEN = "<|pad|>"
EOS_TOKEN = "<|endoftext|>"
_ALPHABET = 256
MIN_VOCAB = _ALPHABET + 2
_SAMPLE_SHARD_BYTES = 1 << 18


def train_bpe(texts: Iterable[str], vocab_size: int, output: Path) -> None:
    """Write a tokenizer.json of `vocab_size` ids, and a tokenizer_config.json beside it.

    Raises:
        DataError: `output` exists or is not named *.json, the vocabulary is smaller than the 256 bytes and 2 special
            tokens, or the text is too small for it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if output.suffix != ".json":
        raise DataError(f"{output}: a trained tokenizer must be named *.json, for example tokenizer.json")
    if output.exists():
        raise DataError(f"{output} exists: remove it, or leave out --train to use it")
    if vocab_size < MIN_VOCAB:
        raise DataError(f"--train {vocab_size}: at least {MIN_VOCAB} (256 bytes and 2 special tokens)")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD_TOKEN, EOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size:
        raise DataError(
            f"the text is too small for {vocab_size} ids: only {tokenizer.get_vocab_size()} found; give more text, or "
            "lower --train"
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(output))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS_TOKEN,
        "pad_token": PAD_TOKEN,
        "clean_up_tokenization_spaces": False,
    }
    output.with_name("tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def sample_texts(files: Iterable[tuple[Path, str]], options: TextOptions, max_bytes: int) -> Iterator[str]:
    """Documents from all over the input, in a fixed order, about `max_bytes` of them."""
    shards = plan_shards(files, options, _SAMPLE_SHARD_BYTES)
    taken = 0
    for index in permute(np.arange(len(shards)), max(1, len(shards)), key=0):
        for extent in shards[int(index)]:
            for text in read_documents(extent, options):
                yield text
                taken += len(text.encode())
                if taken >= max_bytes:
                    return
