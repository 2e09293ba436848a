"""Tokenizes one shard of the input into a part, a tokenized file, in a worker process.

Owns the file names in the parts folder. A part is complete when its `.done` file exists, which has its counts.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from internlm.data.tokenize.shard_encoders import ShardCounts, ShardEncoder
from internlm.data.tokenize.text_inputs import Extent
from internlm.data.tokenized_files.writer import TokenizedWriter


@dataclass
class TokenizedShard:
    """Counts of a tokenized shard.

    Attributes:
        documents, tokens: numbers over all outputs.
        counts: number of skipped or suspicious texts, by kind.
        by_file: number of documents, by input file.
        bad_rows: the errors of the first few rows that were skipped.
        fresh: whether the part was made by this call, not by an interrupted one.
    """

    documents: int
    tokens: int
    counts: dict[str, int]
    by_file: dict[str, int]
    bad_rows: list[str] = field(default_factory=list)
    fresh: bool = True


def part_path(parts: Path, index: int, number: int) -> Path:
    """Path of the part of shard `index` for output `number`."""
    return parts / f"{index:06d}.{number}.bin"


class ShardTokenizer:
    """Tokenizes shards in a worker.

    Args:
        load: loads the encoder, in the worker.
        valid_fraction: share of documents, chosen by a hash of their content, for the last of the outputs.
        parts: folder of the parts.
        num_outputs: 2 with a validation output, else 1.
    """

    def __init__(
        self,
        load: Callable[[], ShardEncoder],
        valid_fraction: float,
        parts: Path,
        num_outputs: int,
    ) -> None:
        self._load, self._parts = load, parts
        self._valid_threshold = int(valid_fraction * 2**64)
        self._num_outputs = num_outputs
        self._encoder: ShardEncoder | None = None

    def __call__(self, numbered: tuple[int, tuple[Extent, ...]]) -> TokenizedShard:
        index, shard = numbered
        done = self._parts / f"{index:06d}.done"
        if done.is_file():
            return TokenizedShard(**json.loads(done.read_text()) | {"fresh": False})
        if self._encoder is None:
            # Processes provide the parallelism; threads of the library would compete with them.
            os.environ["TOKENIZERS_PARALLELISM"] = "false"
            self._encoder = self._load()
        for number in range(self._num_outputs):
            part_path(self._parts, index, number).unlink(missing_ok=True)
        writers = [TokenizedWriter(part_path(self._parts, index, number)) for number in range(self._num_outputs)]
        counts = ShardCounts()
        for key, line, num_tokens in self._encoder.encode(shard, counts):
            writers[self._output_of(key)].write_line(line, num_tokens)
        for writer in writers:
            writer.close()
        documents = sum(writer.num_documents for writer in writers)
        tokens = sum(writer.num_tokens for writer in writers)
        part = TokenizedShard(documents, tokens, dict(counts.content), dict(counts.by_file), counts.bad_rows)
        temporary = done.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(part)))
        os.replace(temporary, done)
        return part

    def _output_of(self, key: str) -> int:
        if not self._valid_threshold:
            return 0
        digest = hashlib.blake2b(key.encode(), digest_size=8).digest()
        return int(int.from_bytes(digest, "big") < self._valid_threshold)
