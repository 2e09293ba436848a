"""Text files in, one tokenized file out: in parallel, restartable, never half written.

Owns the parts folder `NAME.bin.parts`. The input is cut into shards; a worker turns a shard into a part (a tokenized
file) and marks it done; at the end the parts are joined in input order, so the result does not depend on the number of
processes. A run that was interrupted finds the parts that are done and makes the others.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from internlm.data.loaders.read_ahead import WorkerProcesses
from internlm.data.tokenize.input_files import InputFiles, find_inputs, name_some
from internlm.data.tokenize.progress import TokenizeProgress
from internlm.data.tokenize.shard_tokenizer import ShardTokenizer, TokenizedShard, part_path
from internlm.data.tokenize.text_inputs import WITH_NUL, Extent, TextOptions, plan_shards
from internlm.data.tokenize.text_tokenizer import TextTokenizer, load_tokenizer
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.tokenizer_record import TokenizerRecord, read_record, write_record
from internlm.data.tokenized_files.writer import TokenizedWriter, meta_path
from internlm.utils.errors import DataError

_VERSION = 2
_SHARD_BYTES = (2 << 20, 256 << 20)
_SHARDS_A_PROCESS = 32
_STDIN_NAME = "stdin"


@dataclass(frozen=True)
class TokenizeOptions:
    """What to tokenize, with what, into what.

    Attributes:
        inputs: files and folders; "-" is the standard input.
        output: the .bin file to make.
        tokenizer: see `load_tokenizer`.
        text: how documents are found in a file.
        format: of inputs whose suffix does not say it.
        processes: worker processes; 1 works in this process.
        append: add to an existing output.
        add_bos, add_eos: begin / end every document with the tokenizer's bos / eos; None adds it if there is one.
        valid_fraction: this share of the documents, chosen by a hash of their text, goes to `valid_output`.
        restart: forget the parts of an interrupted run with other options.
        trust_remote_code: run the code of a tokenizer that is nothing else.
    """

    inputs: tuple[str, ...]
    output: Path
    tokenizer: Path
    text: TextOptions = field(default_factory=TextOptions)
    format: str | None = None
    processes: int = 1
    append: bool = False
    add_bos: bool | None = False
    add_eos: bool | None = None
    valid_fraction: float = 0.0
    valid_output: Path | None = None
    restart: bool = False
    trust_remote_code: bool = False

    @property
    def outputs(self) -> list[Path]:
        """The files to make, train before valid."""
        return [self.output] + ([self.valid_output] if self.valid_output else [])


@dataclass
class TokenizeResult:
    """What was made.

    Attributes:
        documents, tokens: over all outputs, without what an append found there.
        num_bytes: size of the input.
        megabytes_per_second: speed of this call, parts found done left out.
        notices: what was left out or is odd, a line each.
    """

    documents: int
    tokens: int
    num_bytes: int
    megabytes_per_second: float
    notices: list[str]


def tokenize(options: TokenizeOptions) -> TokenizeResult:
    """Make the outputs; see the module.

    Raises:
        DataError: an output exists and `append` is False or its documents were made otherwise, an input is missing or
            malformed, no text is found, the tokenizer lacks a token that was asked for, or an interrupted run with
            other options left its parts.
    """
    tokenizer = load_tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)
    ends = _ends(options, tokenizer)
    _check_options(options)
    record = TokenizerRecord.of(tokenizer, options.tokenizer, add_bos=bool(ends[0]), add_eos=bool(ends[1]))
    _check_appended(options, record)
    parts = _parts_folder(options.output)
    inputs = [name for name in options.inputs if name != "-"]
    found = find_inputs(inputs, options.format) if inputs else InputFiles([], [])
    files = found.files
    if "-" in options.inputs:
        files.append(_spool_stdin(parts, options.format))
    total = sum(path.stat().st_size for path, _ in files)
    shard_bytes = min(max(total // (options.processes * _SHARDS_A_PROCESS), _SHARD_BYTES[0]), _SHARD_BYTES[1])
    manifest: dict[str, Any] = {
        "version": _VERSION,
        "inputs": [[str(path.resolve()), format, *_stamp(path)] for path, format in files],
        "text": asdict(options.text),
        "tokenizer": record.fingerprint,
        "ends": ends,
        "valid": [options.valid_fraction, str(options.valid_output)],
    }
    manifest = _begin_or_continue(options, parts, manifest, shard_bytes)
    shards = plan_shards(files, options.text, manifest["shard_bytes"])
    load = partial(load_tokenizer, options.tokenizer, trust_remote_code=options.trust_remote_code)
    make = ShardTokenizer(load, options.text, *ends, options.valid_fraction, parts, len(options.outputs))
    made: list[TokenizedShard] = []
    with TokenizeProgress(total) as progress:
        for shard, part in zip(shards, _run(make, shards, options.processes), strict=True):
            progress.advance(sum(extent.num_bytes for extent in shard), part.tokens, resumed=not part.fresh)
            made.append(part)
        speed = progress.megabytes_per_second
    notices = _notices(found, made)
    if not any(part.documents for part in made):
        shutil.rmtree(parts)
        raise DataError("; ".join(["the input has no text, so nothing is written", *notices]))
    documents = tokens = 0
    for number, (output, before) in enumerate(zip(options.outputs, manifest["documents_before"], strict=True)):
        added = _join(parts, len(shards), number, output, before, record)
        documents, tokens = documents + added[0], tokens + added[1]
        if not added[0]:
            notices.append(f"{output}: no document fell to it; give more text, or another --valid-fraction")
    shutil.rmtree(parts)
    return TokenizeResult(documents, tokens, total, speed, notices)


def _notices(found: InputFiles, made: list[TokenizedShard]) -> list[str]:
    """What was left out or is odd, a line each."""
    counts: Counter[str] = Counter()
    by_file: Counter[str] = Counter()
    for part in made:
        counts.update(part.counts)
        by_file.update(part.by_file)
    left_out = [f"{counts[name]:,} {name}" for name in sorted(counts) if counts[name] and name != WITH_NUL]
    empty = [path for path, _ in found.files if not by_file[str(path)]]
    times = Counter(path.resolve() for path, _ in found.files)
    twice = [path for path, number in times.items() if number > 1]
    lines = [
        (found.left_out, f"left out {len(found.left_out):,} file(s) of no known format: {name_some(found.left_out)}"),
        (empty, f"{len(empty):,} file(s) without any text: {name_some(empty)}"),
        (twice, f"{len(twice):,} file(s) found more than once, and read each time: {name_some(twice)}"),
        (left_out, f"left out {', '.join(left_out)}"),
        (counts[WITH_NUL], f"{counts[WITH_NUL]:,} {WITH_NUL}, kept as they are"),
    ]
    return [line for condition, line in lines if condition]


def _ends(options: TokenizeOptions, tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """The tokens before and after every document."""
    if options.add_bos and tokenizer.bos_id is None:
        raise DataError(f"{options.tokenizer}: the tokenizer names no bos token; leave out --bos")
    if options.add_eos and tokenizer.eos_id is None:
        raise DataError(f"{options.tokenizer}: the tokenizer names no eos token; use --no-eos")
    before = [tokenizer.bos_id] if options.add_bos is not False and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if options.add_eos is not False and tokenizer.eos_id is not None else []
    return before, after


def _check_options(options: TokenizeOptions) -> None:
    if options.processes < 1:
        raise DataError(f"--processes {options.processes}: must be at least 1")
    if bool(options.valid_output) != (options.valid_fraction > 0) or not 0 <= options.valid_fraction < 1:
        raise DataError("--valid-fraction (in (0, 1)) and --valid-output belong together")
    if options.valid_output == options.output:
        raise DataError(f"{options.output} is both the output and the valid output")
    for output in options.outputs:
        if output.suffix != ".bin":
            raise DataError(f"{output}: the output must be named *.bin")


def _check_appended(options: TokenizeOptions, record: TokenizerRecord) -> None:
    """Refuse to put documents of two tokenizers into one file."""
    if not options.append:
        return
    for output in filter(Path.exists, options.outputs):
        known = read_record(output)
        if known is None:
            print(
                f"warning: {output} has no record of its tokenizer, so nothing tells whether --append goes on with "
                "the same one",
                file=sys.stderr,
            )
        elif differences := known.differences(record):
            raise DataError(
                f"{output} was made otherwise than this --append would go on: {'; '.join(differences)}. "
                "Repeat it with the options of the first run, or write another file"
            )


def _parts_folder(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def _stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def _spool_stdin(parts: Path, format: str | None) -> tuple[Path, str]:
    """Copy the standard input to a file, from where it is read in parallel; such a run cannot be continued."""
    if format not in ("txt", "json", "jsonl"):
        raise DataError("the standard input needs --format txt, json or jsonl")
    shutil.rmtree(parts, ignore_errors=True)
    parts.mkdir(parents=True)
    path = parts / _STDIN_NAME
    with open(path, "wb") as file:
        shutil.copyfileobj(sys.stdin.buffer, file)
    return path, format


def _begin_or_continue(
    options: TokenizeOptions, parts: Path, manifest: dict[str, Any], shard_bytes: int
) -> dict[str, Any]:
    """The manifest of the interrupted run, or that of a new one, written."""
    path = parts / "manifest.json"
    if path.is_file() and not options.restart:
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); forget the interrupted run with --restart") from error
        changed = [key for key in manifest if old.get(key) != json.loads(json.dumps(manifest[key]))]
        # Where no part is done, as after a mistake in the first file, there is nothing to lose.
        begins_anew = bool(changed) and not any(parts.glob("*.done"))
        if changed and not begins_anew:
            raise DataError(
                f"{parts} holds the parts of an interrupted run with other {', '.join(changed)}: repeat that run to "
                "finish it, or forget it with --restart"
            )
        if not begins_anew:
            print(f"continuing the interrupted run in {parts}", file=sys.stderr)
            return old
    for output in options.outputs:
        if output.exists() and not options.append:
            raise DataError(f"{output} exists: choose another name, remove it, or add to it with --append")
    before = [len(TokenizedFile(output)) if output.exists() else 0 for output in options.outputs]
    manifest = manifest | {"shard_bytes": shard_bytes, "documents_before": before}
    if parts.is_dir():
        for old_part in parts.glob("[0-9]*"):
            old_part.unlink()
    parts.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(manifest))
    os.replace(temporary, path)
    return manifest


def _run(make: ShardTokenizer, shards: list[tuple[Extent, ...]], processes: int) -> Iterator[TokenizedShard]:
    if processes == 1:
        yield from map(make, enumerate(shards))
        return
    workers = WorkerProcesses(make, lambda: enumerate(shards), min(processes, max(1, len(shards))))
    try:
        yield from workers
    finally:
        workers.stop()


def _join(
    parts: Path, num_parts: int, number: int, output: Path, before: int, record: TokenizerRecord
) -> tuple[int, int]:
    """Write one output from its parts; returns the documents and tokens added."""
    paths = [part_path(parts, index, number) for index in range(num_parts)]
    # After a crash behind the join, the output already has the new documents: they must not be added twice.
    joined = output.exists() and len(np.load(meta_path(output), mmap_mode="r")) > before
    if not output.exists():
        write_record(output, record)
    if not joined and (paths or not output.exists()):
        with TokenizedWriter(output, append=output.exists()) as writer:
            for path in paths:
                writer.write_file(path)
    meta = np.load(meta_path(output), mmap_mode="r")
    return len(meta) - before, int(meta[before:, -1].sum())
