"""The part of a shard: the documents of a piece of the input as a tokenized file, made once, in some process.

Owns the names in the parts folder. A part counts when its `.done` file is there, which also holds what it gave.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from internlm.data.tokenize.text_inputs import Extent, TextOptions, read_documents
from internlm.data.tokenize.text_tokenizer import TextTokenizer
from internlm.data.tokenized_files.writer import TokenizedWriter

_BATCH_CHARACTERS = 1 << 18
"""Texts are encoded in batches of about this size: enough to amortise a call, small enough to stay in the caches."""
_NO_TOKEN = "texts that give no token"


@dataclass
class TokenizedShard:
    """What a shard gave.

    Attributes:
        documents, tokens: over all outputs.
        counts: what was left out or is odd, by name.
        by_file: documents by input file.
        fresh: made now rather than found.
    """

    documents: int
    tokens: int
    counts: dict[str, int]
    by_file: dict[str, int]
    fresh: bool = True


def part_path(parts: Path, index: int, number: int) -> Path:
    """The file of part `number` of shard `index` in the folder `parts`."""
    return parts / f"{index:06d}.{number}.bin"


class ShardTokenizer:
    """Makes the part of a shard; runs in a worker.

    Args:
        load: gives the tokenizer, in the worker.
        before, after: ids around every document.
        valid_fraction: this share of the documents, by a hash of their text, goes to the last of `num_outputs` files.
        parts: the folder of the parts.
    """

    def __init__(
        self,
        load: Callable[[], TextTokenizer],
        text: TextOptions,
        before: list[int],
        after: list[int],
        valid_fraction: float,
        parts: Path,
        num_outputs: int,
    ) -> None:
        self._load, self._text, self._parts = load, text, parts
        self._before, self._after = before, after
        self._valid_threshold = int(valid_fraction * 2**64)
        self._num_outputs = num_outputs
        self._tokenizer: TextTokenizer | None = None

    def __call__(self, numbered: tuple[int, tuple[Extent, ...]]) -> TokenizedShard:
        index, shard = numbered
        done = self._parts / f"{index:06d}.done"
        if done.is_file():
            return TokenizedShard(**json.loads(done.read_text()) | {"fresh": False})
        if self._tokenizer is None:
            # Parallelism comes from the processes; threads of the library below them would only compete.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            self._tokenizer = self._load()
        for number in range(self._num_outputs):
            part_path(self._parts, index, number).unlink(missing_ok=True)
        writers = [TokenizedWriter(part_path(self._parts, index, number)) for number in range(self._num_outputs)]
        counts: Counter[str] = Counter()
        by_file: Counter[str] = Counter()
        for texts in _batches(self._documents(shard, counts, by_file)):
            for text, ids in zip(texts, self._tokenizer.encode_batch(texts), strict=True):
                if ids:
                    writers[self._output_of(text)].write(self._before + ids + self._after)
                else:
                    counts[_NO_TOKEN] += 1
        for writer in writers:
            writer.close()
        documents = sum(writer.num_documents for writer in writers)
        tokens = sum(writer.num_tokens for writer in writers)
        part = TokenizedShard(documents, tokens, dict(counts), dict(by_file))
        temporary = done.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(part)))
        os.replace(temporary, done)
        return part

    def _documents(self, shard: tuple[Extent, ...], counts: Counter[str], by_file: Counter[str]) -> Iterator[str]:
        for extent in shard:
            for text in read_documents(extent, self._text, counts):
                by_file[extent.path] += 1
                yield text

    def _output_of(self, text: str) -> int:
        if not self._valid_threshold:
            return 0
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int(int.from_bytes(digest, "big") < self._valid_threshold)


def _batches(documents: Iterator[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
