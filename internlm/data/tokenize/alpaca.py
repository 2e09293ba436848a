"""Tokenizes instruction data (Alpaca-style records), with masked prompts.

Owns the records, the split into train and valid, and the reports on skipped or truncated records. A record is
`{"instruction", "input" (optional), "output"}`. Records are streamed twice: to count them, and to write them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from internlm.data.permutation import permute
from internlm.data.tokenize.input_files import find_inputs
from internlm.data.tokenize.json_values import iterate_json_array, iterate_json_lines
from internlm.data.tokenize.prompts import Example, Record, build_prompt_format, encode_examples
from internlm.data.tokenize.text_inputs import check_unicode
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenized_files.tokenizer_record import TokenizerRecord, write_record
from internlm.data.tokenized_files.writer import TokenizedWriter, encode_masked_line
from internlm.utils.errors import DataError

_FIELDS = ("instruction", "input", "output")
_MAX_RECORD_NUMBERS = 8
_SEED = 1024
_INTERNEVO_SEED = 0


@dataclass(frozen=True)
class AlpacaResult:
    """Counts of tokenized instruction data.

    Attributes:
        train_documents, valid_documents: documents of each split.
        tokens: tokens of both splits.
        target_tokens: tokens that contribute loss.
        longest: tokens of the longest example, before truncation.
        notices: skipped, truncated or unusable records, one line per kind.
    """

    train_documents: int
    valid_documents: int
    tokens: int
    target_tokens: int
    longest: int
    notices: list[str]


@dataclass
class _RecordList:
    """Number of records of one kind, and the indices of the first few, counted from 0."""

    description: str
    first: list[int] = field(default_factory=list)
    count: int = 0

    def add(self, number: int) -> None:
        self.count += 1
        if len(self.first) < _MAX_RECORD_NUMBERS:
            self.first.append(number)

    def __str__(self) -> str:
        rest = " ..." if self.count > len(self.first) else ""
        return f"{self.count:,} {self.description}: record {', '.join(map(str, self.first))}{rest}"


def tokenize_alpaca(
    dataset: Path,
    output: Path,
    tokenizer_path: Path,
    *,
    valid_fraction: float = 0.1,
    seed: int | None = None,
    type_name: str = "en",
    format_name: str = "alpaca",
    add_bos: bool = False,
    seq_len: int | None = None,
    trust_remote_code: bool = False,
) -> AlpacaResult:
    """Tokenize records into `<output>/train/<type>/<name>.bin` and `<output>/valid/<type>/<name>.bin`.

    Args:
        dataset: a JSON array or JSON lines, possibly compressed.
        output: folder of the two splits.
        tokenizer_path: see `load_tokenizer`.
        valid_fraction: share of the records, drawn without replacement, for validation.
        seed: seed of the draw; None is 1024.
        type_name: name of the type folder.
        format_name: see `build_prompt_format`. "internevo" reproduces the files of InternEvo's tool, named
            `dataset.bin`: it draws with replacement, from seed 0, so fewer records are for validation.
        add_bos: whether documents start with the bos of the tokenizer ("alpaca" only).
        seq_len: data.seq_len of the training; examples that exceed it are reported, not truncated.
        trust_remote_code: whether to run custom code of the tokenizer folder.

    Raises:
        DataError: an input file is missing, malformed or without a record, or an output file exists.
    """
    if not 0 <= valid_fraction < 1:
        raise DataError(f"--valid-fraction {valid_fraction} is not in [0, 1)")
    if seq_len is not None and seq_len < 1:
        raise DataError(f"--seq-len {seq_len}: must be at least 1")
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=trust_remote_code)
    prompts = build_prompt_format(
        format_name, tokenizer, tokenizer_path, add_bos=add_bos, trust_remote_code=trust_remote_code
    )
    as_internevo = format_name == "internevo"
    numbers = [number for number, record in read_records(dataset) if record["output"] or as_internevo]
    if not numbers:
        raise DataError(f"{dataset}: no record has an output, so nothing is written")
    is_valid, num_valid = _split(len(numbers), valid_fraction, seed, as_internevo)
    name = "dataset" if as_internevo else dataset.name.partition(".")[0]
    outputs = [output / split / type_name / f"{name}.bin" for split in ("train", "valid")][: 2 if num_valid else 1]
    for path in outputs:
        if path.exists():
            raise DataError(f"{path} exists: choose another folder, or remove it")
    empty = _RecordList("records without an output, skipped")
    selected = _select_records(dataset, None if as_internevo else empty)
    writers = [TokenizedWriter(path) for path in outputs]
    report = _ExampleReport(seq_len, prompts.max_tokens)
    try:
        examples = encode_examples(selected, prompts, tokenizer)
        for index, (number, example) in enumerate(zip(numbers, examples, strict=True)):
            line = encode_masked_line(example.ids, example.loss_mask)
            writers[is_valid(index)].write_line(line, len(example.ids))
            report.add(number, example)
        tokenizer_record = TokenizerRecord.of(
            tokenizer, tokenizer_path, add_bos=prompts.add_bos, add_eos=bool(prompts.end), format=format_name
        )
        for path, writer in zip(outputs, writers, strict=True):
            write_record(path, tokenizer_record)
            writer.close()
    except BaseException:
        for writer in writers:
            writer.discard()
        raise
    documents = [writer.num_documents for writer in writers] + [0]
    if valid_fraction and not num_valid:
        report.notices.append(f"no record for validation: {valid_fraction:g} of {len(numbers):,} is less than one")
    return AlpacaResult(
        documents[0],
        documents[1],
        sum(writer.num_tokens for writer in writers),
        report.num_targets,
        report.longest,
        [*prompts.notices, *report.notices, *(str(each) for each in (empty, *report.kinds) if each.count)],
    )


def read_records(dataset: Path) -> Iterator[tuple[int, Record]]:
    """Iterate over the records of a file, as (index, {"instruction", "input", "output"}).

    Raises:
        DataError: the file is missing or malformed, or a record lacks a field; names its index.
    """
    if not dataset.is_file():
        raise DataError(f"{dataset}: no such file")
    [(_, kind)] = find_inputs([dataset], "json").files
    if kind not in ("json", "jsonl"):
        raise DataError(f"{dataset}: {kind}; expected a JSON array or JSON lines")
    records = iterate_json_lines(dataset) if kind == "jsonl" else iterate_json_array(dataset)
    for number, record in enumerate(records):
        place = f"{dataset}: record {number}"
        if not isinstance(record, dict):
            raise DataError(f"{place} is {type(record).__name__}, expected an object with 'instruction' and 'output'")
        fields = record | {"input": "" if record.get("input") is None else record["input"]}
        for name in _FIELDS:
            if not isinstance(fields.get(name), str):
                raise DataError(f"{place}: '{name}' is missing or not text; it has {sorted(record)}")
            check_unicode(fields[name], f"{place}: '{name}'")
        yield number, {name: fields[name] for name in _FIELDS}


def _select_records(dataset: Path, empty: _RecordList | None) -> Iterator[Record]:
    """The records with an output; the others are added to `empty`, or included if it is None."""
    for number, record in read_records(dataset):
        if empty is None or record["output"]:
            yield record
        else:
            empty.add(number)


def _split(count: int, fraction: float, seed: int | None, as_internevo: bool) -> tuple[Callable[[int], bool], int]:
    """A function from the index of a record to whether it is for validation, and the number of these records."""
    if as_internevo:
        random = np.random.RandomState(_INTERNEVO_SEED if seed is None else seed)
        drawn = set(random.choice(count, int(count * fraction)).tolist())
        return lambda index: index in drawn, len(drawn)
    num_valid = round(count * fraction)
    key = _SEED if seed is None else seed
    return lambda index: bool(num_valid) and int(permute(np.array([index]), count, key)[0]) < num_valid, num_valid


class _ExampleReport:
    """Counts of targets, and of examples that are truncated or lose their labels."""

    def __init__(self, seq_len: int | None, max_tokens: int | None) -> None:
        self._seq_len = seq_len
        self.num_targets = self.longest = 0
        self.notices: list[str] = []
        self._truncated = _RecordList(f"answers truncated at the {max_tokens} tokens of an example in this format")
        self._lost = _RecordList(f"answers lost: their prompts fill the {max_tokens} tokens of an example")
        self._unlabeled = _RecordList("examples without a label, from which nothing is learned")
        self._prompt_exceeds = _RecordList(f"prompts fill --seq-len {seq_len}, so nothing of their answers is learned")
        self._answer_exceeds = _RecordList(
            f"answers exceed --seq-len {seq_len}: unpacked data truncates them, packed data separates them from their "
            "prompt"
        )
        self.kinds = [self._unlabeled, self._truncated, self._lost, self._prompt_exceeds, self._answer_exceeds]

    def add(self, number: int, example: Example) -> None:
        self.num_targets += sum(example.loss_mask)
        self.longest = max(self.longest, len(example.ids) + example.num_truncated)
        if example.num_truncated:
            (self._truncated if example.has_answer else self._lost).add(number)
        if not example.labels_within(None):
            self._unlabeled.add(number)
        elif self._seq_len is not None and len(example.ids) > self._seq_len:
            kind = self._answer_exceeds if example.labels_within(self._seq_len) else self._prompt_exceeds
            kind.add(number)
