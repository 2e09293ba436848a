"""Tokenizes one shard of the input into a part, a tokenized file, in a worker process.

Owns the file names in the parts folder. A part is complete when its `.done` file exists, which has its counts.
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
"""Characters of a batch of texts: enough to amortize a call, few enough to fit the caches."""
_NO_TOKEN = "texts without a token"


@dataclass
class TokenizedShard:
    """Counts of a tokenized shard.

    Attributes:
        documents, tokens: numbers over all outputs.
        counts: number of skipped or suspicious texts, by kind.
        by_file: number of documents, by input file.
        fresh: whether the part was made by this call, not by an interrupted one.
    """

    documents: int
    tokens: int
    counts: dict[str, int]
    by_file: dict[str, int]
    fresh: bool = True


def part_path(parts: Path, index: int, number: int) -> Path:
    """Path of the part of shard `index` for output `number`."""
    return parts / f"{index:06d}.{number}.bin"


class ShardTokenizer:
    """Tokenizes shards in a worker.

    Args:
        load: loads the tokenizer, in the worker.
        text: how documents are found.
        before, after: ids to put before and after every document.
        valid_fraction: share of documents, chosen by a hash of their text, for the last of the outputs.
        parts: folder of the parts.
        num_outputs: 2 with a validation output, else 1.
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
            # Processes provide the parallelism; threads of the library would compete with them.
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
