"""Tokenizes text files or conversations into one tokenized file, in parallel and restartably.

Owns the parts folder `NAME.bin.parts`. The input is partitioned into shards; a worker tokenizes a shard into a part (a
tokenized file) and marks it as done; finally the parts are concatenated in input order, so the result does not depend
on the number of processes. After an interruption, only the missing parts are made.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from internlm.data.conversations.chat_template import ChatTemplate
from internlm.data.conversations.encoder import ConversationOptions, load_template_for
from internlm.data.images.settings import ImageSettings
from internlm.data.loaders.read_ahead import WorkerProcesses
from internlm.data.tokenize.input_files import InputFiles, find_inputs
from internlm.data.tokenize.notices import describe_notices
from internlm.data.tokenize.progress import TokenizeProgress
from internlm.data.tokenize.shard_encoders import (
    ShardEncoder,
    load_conversation_encoder,
    load_text_encoder,
)
from internlm.data.tokenize.shard_tokenizer import ShardTokenizer, TokenizedShard, part_path
from internlm.data.tokenize.text_inputs import Extent, TextOptions, plan_shards
from internlm.data.tokenize.text_tokenizer import TextTokenizer, load_tokenizer
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.tokenizer_record import TokenizerRecord, read_record, write_record
from internlm.data.tokenized_files.writer import TokenizedWriter, map_meta
from internlm.utils.errors import DataError

_VERSION = 2
_SHARD_BYTES = (2 << 20, 256 << 20)
_SHARDS_PER_PROCESS = 32
_STDIN_NAME = "stdin"
ON_BAD_DATA = ("stop", "skip")
_MANIFEST_NAMES = {
    "version": "file version",
    "text": "text options",
    "ends": "bos or eos",
    "valid": "validation options",
    "conversations": "options of conversations, chat template or treatment of bad data",
}
"""How messages call the entries of the manifest."""


@dataclass(frozen=True)
class TokenizeOptions:
    """Inputs, outputs and settings of a tokenization.

    Attributes:
        inputs: files and folders; "-" is the standard input.
        output: the .bin file to write.
        tokenizer: see `load_tokenizer`.
        text: how documents are found in a file.
        format: format of inputs with an unknown suffix.
        processes: number of worker processes; 1 works in this process.
        append: whether to append to an existing output.
        add_bos, add_eos: whether every document starts with bos / ends with eos; None if the tokenizer has it.
        conversations: how rows of conversations are encoded; None tokenizes texts.
        images: of the placeholders of rows of conversations with pictures; None: they have none.
        on_bad_data: "stop", or "skip" and count rows of conversations that cannot be used.
        valid_fraction: share of documents, chosen by a hash of their content, for `valid_output`.
        valid_output: the .bin file of validation documents.
        restart: whether to discard the parts of an interrupted run.
        trust_remote_code: whether to run custom code of the tokenizer folder.
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
    conversations: ConversationOptions | None = None
    images: ImageSettings | None = None
    on_bad_data: str = "stop"
    valid_fraction: float = 0.0
    valid_output: Path | None = None
    restart: bool = False
    trust_remote_code: bool = False

    @property
    def outputs(self) -> list[Path]:
        """The .bin files to write, train before valid."""
        return [self.output] + ([self.valid_output] if self.valid_output else [])


@dataclass
class TokenizeResult:
    """Result of a tokenization.

    Attributes:
        documents, tokens: numbers added to all outputs.
        num_bytes: size of the input.
        megabytes_per_second: speed of this call, without parts of an interrupted run; 10^6 bytes per second.
        notices: ignored files, skipped content and the like, one line per kind.
    """

    documents: int
    tokens: int
    num_bytes: int
    megabytes_per_second: float
    notices: list[str]


def tokenize(options: TokenizeOptions) -> TokenizeResult:
    """Tokenize text files or conversations into the outputs of `options`.

    Raises:
        DataError: an output exists and `append` is False or its tokenizer differs, an input is missing or malformed,
            there is nothing to write, the tokenizer lacks a requested token or the chat template, a row cannot be used,
            or there are parts of an interrupted run with other options.
    """
    tokenizer = load_tokenizer(options.tokenizer, trust_remote_code=options.trust_remote_code)
    bos, eos = _bos_and_eos(options, tokenizer)
    _check_options(options)
    template = _load_template(options)
    record = TokenizerRecord.of(
        tokenizer, options.tokenizer, add_bos=bool(bos), add_eos=bool(eos), format=_record_format(options, template)
    )
    _check_appended(options, record)
    parts = _parts_folder(options.output)
    inputs = [name for name in options.inputs if name != "-"]
    found = find_inputs(inputs, options.format) if inputs else InputFiles([], [])
    files = found.files
    if "-" in options.inputs:
        files.append(_spool_stdin(parts, options.format))
    total = sum(path.stat().st_size for path, _ in files)
    shard_bytes = min(max(total // (options.processes * _SHARDS_PER_PROCESS), _SHARD_BYTES[0]), _SHARD_BYTES[1])
    manifest: dict[str, Any] = {
        "version": _VERSION,
        "inputs": [[str(path.resolve()), format, *_stamp(path)] for path, format in files],
        "text": asdict(options.text),
        "tokenizer": record.fingerprint,
        "ends": [bos, eos],
        "valid": [options.valid_fraction, str(options.valid_output)],
        "conversations": _conversation_entry(options, template),
    }
    manifest = _begin_or_continue(options, parts, manifest, shard_bytes)
    shards = plan_shards(files, options.text, manifest["shard_bytes"])
    load = _encoder_loader(options, template, bos, eos)
    tokenize_shard = ShardTokenizer(load, options.valid_fraction, parts, len(options.outputs))
    results: list[TokenizedShard] = []
    with TokenizeProgress(total) as progress:
        for shard, part in zip(shards, _tokenize_shards(tokenize_shard, shards, options.processes), strict=True):
            progress.advance(sum(extent.num_bytes for extent in shard), part.tokens, resumed=not part.fresh)
            results.append(part)
        speed = progress.megabytes_per_second
    notices = describe_notices(found, results)
    if not any(part.documents for part in results):
        shutil.rmtree(parts)
        content = "text" if options.conversations is None else "conversation to learn from"
        raise DataError("; ".join([f"the input has no {content}, so nothing is written", *notices]))
    documents = tokens = 0
    for number, (output, before) in enumerate(zip(options.outputs, manifest["documents_before"], strict=True)):
        added = _merge_parts(parts, len(shards), number, output, before, record)
        documents, tokens = documents + added[0], tokens + added[1]
        if not added[0]:
            notices.append(f"{output}: has no document; add text, or change --valid-fraction")
    shutil.rmtree(parts)
    return TokenizeResult(documents, tokens, total, speed, notices)


def _bos_and_eos(options: TokenizeOptions, tokenizer: TextTokenizer) -> tuple[list[int], list[int]]:
    """The ids to put before and after every document."""
    if options.conversations is not None:
        if options.add_bos or options.add_eos is not None:
            raise DataError("conversations have the bos and eos of the chat template: drop --bos, --eos and --no-eos")
        return [], []
    if options.add_bos and tokenizer.bos_id is None:
        raise DataError(f"{options.tokenizer}: the tokenizer names no bos token; drop --bos")
    if options.add_eos and tokenizer.eos_id is None:
        raise DataError(f"{options.tokenizer}: the tokenizer names no eos token; use --no-eos")
    before = [tokenizer.bos_id] if options.add_bos is not False and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if options.add_eos is not False and tokenizer.eos_id is not None else []
    return before, after


def _check_options(options: TokenizeOptions) -> None:
    if options.processes < 1:
        raise DataError(f"--processes {options.processes}: must be at least 1")
    if options.on_bad_data not in ON_BAD_DATA:
        raise DataError(f"--on-bad-data {options.on_bad_data}: expected one of {', '.join(ON_BAD_DATA)}")
    if bool(options.valid_output) != (options.valid_fraction > 0) or not 0 <= options.valid_fraction < 1:
        raise DataError("--valid-fraction (in (0, 1)) and --valid-output must be given together")
    if options.valid_output == options.output:
        raise DataError(f"{options.output} is both the output and the valid output")
    for output in options.outputs:
        if output.is_dir():
            raise DataError(f"{output}: a folder; name the file to write in it, such as {output / 'NAME.bin'}")
        if output.suffix != ".bin":
            raise DataError(f"{output}: the output must be named *.bin")


def _encoder_loader(
    options: TokenizeOptions, template: ChatTemplate | None, bos: list[int], eos: list[int]
) -> Callable[[], ShardEncoder]:
    """A function that loads the encoder, to be called in a worker."""
    trust = options.trust_remote_code
    if options.conversations is None:
        return partial(load_text_encoder, options.tokenizer, options.text, bos, eos, trust_remote_code=trust)
    return partial(
        load_conversation_encoder,
        options.tokenizer,
        template,
        options.conversations,
        skip_bad_rows=options.on_bad_data == "skip",
        trust_remote_code=trust,
        images=options.images,
    )


def _load_template(options: TokenizeOptions) -> ChatTemplate | None:
    if options.conversations is None:
        return None
    return load_template_for(options.conversations, options.tokenizer, trust_remote_code=options.trust_remote_code)


def _conversation_entry(options: TokenizeOptions, template: ChatTemplate | None) -> list[Any] | None:
    """The entry of the manifest for everything that changes the ids of conversations; None for texts."""
    if options.conversations is None:
        return None
    images = [] if options.images is None else [options.images.facts, str(options.images.folder)]
    return [asdict(options.conversations), template.fingerprint if template else None, options.on_bad_data, *images]


def _record_format(options: TokenizeOptions, template: ChatTemplate | None) -> str:
    """The format that the record of the tokenizer names; it differs between chat templates."""
    if options.conversations is None:
        return "text"
    images = options.images
    pictures = "" if images is None else f", pictures of {images.tokens_per_image} tokens {images.token_id}"
    return (f"conversations, template {template.fingerprint}" if template else "completions") + pictures


def _check_appended(options: TokenizeOptions, record: TokenizerRecord) -> None:
    """Refuse to append documents of another tokenizer, or with other bos and eos."""
    if not options.append:
        return
    for output in filter(Path.exists, options.outputs):
        known = read_record(output)
        if known is None:
            print(
                f"warning: {output} has no record of its tokenizer, so --append cannot check that it is the same",
                file=sys.stderr,
            )
        elif differences := known.differences(record):
            raise DataError(
                f"{output} was made with other settings than this --append: {'; '.join(differences)}. "
                "Use the settings of the first run, or write another file"
            )


def _parts_folder(output: Path) -> Path:
    return output.with_name(output.name + ".parts")


def _stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_size, path.stat().st_mtime_ns


def _spool_stdin(parts: Path, format: str | None) -> tuple[Path, str]:
    """Copy the standard input to a file, to be read in parallel. Such a run cannot be continued."""
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
    """Return the manifest of the interrupted run, or write and return that of a new one."""
    path = parts / "manifest.json"
    if path.is_file() and not options.restart:
        try:
            old = json.loads(path.read_text())
        except ValueError as error:
            raise DataError(f"{path}: damaged ({error}); discard the interrupted run with --restart") from error
        changed = [key for key in manifest if old.get(key) != json.loads(json.dumps(manifest[key]))]
        # Without a finished part, as after an error in the first file, there is nothing to lose.
        starts_over = bool(changed) and not any(parts.glob("*.done"))
        if changed and not starts_over:
            names = ", ".join(_MANIFEST_NAMES.get(key, key) for key in changed)
            raise DataError(
                f"{parts} has parts of an interrupted run with other {names}: repeat that run to finish "
                "it, or discard it with --restart"
            )
        if not starts_over:
            print(f"continuing the interrupted run in {parts}", file=sys.stderr)
            return old
    for output in options.outputs:
        if output.exists() and not options.append:
            raise DataError(f"{output} exists: choose another name, remove it, or append to it with --append")
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


def _tokenize_shards(
    tokenize_shard: ShardTokenizer, shards: list[tuple[Extent, ...]], processes: int
) -> Iterator[TokenizedShard]:
    if processes == 1:
        yield from map(tokenize_shard, enumerate(shards))
        return
    workers = WorkerProcesses(tokenize_shard, lambda: enumerate(shards), min(processes, max(1, len(shards))))
    try:
        yield from workers
    finally:
        workers.stop()


def _merge_parts(
    parts: Path, num_parts: int, number: int, output: Path, before: int, record: TokenizerRecord
) -> tuple[int, int]:
    """Write one output from its parts; returns the numbers of documents and tokens added."""
    paths = [part_path(parts, index, number) for index in range(num_parts)]
    # After a crash that followed the merge, the output has the new documents already.
    is_merged = output.exists() and len(map_meta(output)) > before
    if not output.exists():
        write_record(output, record)
    if not is_merged and (paths or not output.exists()):
        with TokenizedWriter(output, append=output.exists()) as writer:
            for path in paths:
                writer.write_file(path)
    meta = map_meta(output)
    return len(meta) - before, int(meta[before:, -1].sum())
