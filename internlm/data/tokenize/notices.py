"""Describes what a tokenization ignored, skipped or found suspicious."""

from __future__ import annotations

from collections import Counter

from internlm.data.tokenize.input_files import InputFiles, name_some
from internlm.data.tokenize.shard_encoders import BAD_ROWS
from internlm.data.tokenize.shard_tokenizer import TokenizedShard
from internlm.data.tokenize.text_inputs import WITH_NUL

_MAX_BAD_ROWS = 4


def describe_notices(found: InputFiles, results: list[TokenizedShard]) -> list[str]:
    """Describe ignored files, files without text, duplicates and skipped content, one line each."""
    counts: Counter[str] = Counter()
    by_file: Counter[str] = Counter()
    for part in results:
        counts.update(part.counts)
        by_file.update(part.by_file)
    skipped = [f"{counts[name]:,} {name}" for name in sorted(counts) if counts[name] and name != WITH_NUL]
    bad_rows = [message for part in results for message in part.bad_rows]
    empty = [path for path, _ in found.files if not by_file[str(path)]]
    occurrences = Counter(path.resolve() for path, _ in found.files)
    duplicates = [path for path, number in occurrences.items() if number > 1]
    lines = [
        (found.ignored, f"ignored {len(found.ignored):,} file(s) of unknown format: {name_some(found.ignored)}"),
        (empty, f"{len(empty):,} file(s) without any text: {name_some(empty)}"),
        (duplicates, f"{len(duplicates):,} file(s) named more than once and read each time: {name_some(duplicates)}"),
        (skipped, f"skipped {', '.join(skipped)}"),
        (bad_rows, f"the first of the {BAD_ROWS}: {'; '.join(bad_rows[:_MAX_BAD_ROWS])}"),
        (counts[WITH_NUL], f"{counts[WITH_NUL]:,} {WITH_NUL}, kept unchanged"),
    ]
    return [line for condition, line in lines if condition]
