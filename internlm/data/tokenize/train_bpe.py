"""Trains a byte-level BPE tokenizer, in files that `tokenizers` and `transformers` load.

Owns its special tokens: id 0 is padding (InternEvo never trains on id 0), id 1 is eos.
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
    """Train a tokenizer with `vocab_size` ids; write `output` and a tokenizer_config.json beside it.

    Raises:
        DataError: `output` exists or is not named *.json, `vocab_size` is less than the 256 bytes and 2 special tokens,
            or there is too little text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if output.suffix != ".json":
        raise DataError(f"{output}: a trained tokenizer must be named *.json, for example tokenizer.json")
    if output.exists():
        raise DataError(f"{output} exists: remove it, or drop --train to use it")
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
            f"too little text for {vocab_size} ids: only {tokenizer.get_vocab_size()} found; add text, or lower --train"
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
    """Sample about `max_bytes` of documents from all parts of the input, in a fixed order."""
    shards = plan_shards(files, options, _SAMPLE_SHARD_BYTES)
    num_bytes = 0
    for index in permute(np.arange(len(shards)), max(1, len(shards)), key=0):
        for extent in shards[int(index)]:
            for text in read_documents(extent, options):
                yield text
                num_bytes += len(text.encode())
                if num_bytes >= max_bytes:
                    return
