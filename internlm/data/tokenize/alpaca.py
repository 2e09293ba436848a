"""Instruction data (Alpaca-style records) into tokenized files, with the prompt masked.

Owns the records, the split into train and valid, and what is left out or cut. A record is `{"instruction", "input"
(optional), "output"}`; records are read one by one, twice: once to count them, once to write them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from internlm.data.permutation import permute
from internlm.data.tokenize.input_files import find_inputs
from internlm.data.tokenize.json_values import iterate_json_array, iterate_json_lines
from internlm.data.tokenize.prompts import Example, Record, encode_examples, prompt_format
from internlm.data.tokenize.text_inputs import check_unicode
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenized_files.tokenizer_record import TokenizerRecord, write_record
from internlm.data.tokenized_files.writer import TokenizedWriter, encode_masked_line
from internlm.utils.errors import DataError

_FIELDS = ("instruction", "input", "output")
_NAMED_RECORDS = 8
_SEED = 1024
_INTERNEVO_SEED = 0


@dataclass(frozen=True)
class AlpacaResult:
    """Documents and tokens of each split, how many of the tokens contribute loss, and what is odd, a line each."""

    train_documents: int
    valid_documents: int
    tokens: int
    target_tokens: int
    longest: int
    notices: list[str]


@dataclass
class _Numbers:
    """Records of one kind: the first few by number, counted from 0, and how many."""

    what: str
    first: list[int] = field(default_factory=list)
    count: int = 0

    def add(self, number: int) -> None:
        self.count += 1
        if len(self.first) < _NAMED_RECORDS:
            self.first.append(number)

    def __str__(self) -> str:
        rest = " ..." if self.count > len(self.first) else ""
        return f"{self.count:,} {self.what}: record {', '.join(map(str, self.first))}{rest}"


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
    """Write `<output>/train/<type>/<name>.bin` and `<output>/valid/<type>/<name>.bin`.

    Args:
        dataset: a JSON array or JSON lines, also compressed.
        valid_fraction: this share of the records, drawn without replacement, goes to valid.
        seed: of the draw; None is 1024.
        format_name: see `prompt_format`. With "internevo" the files are those that InternEvo's tool writes, under its
            names (`dataset.bin`): it draws with replacement, from seed 0, so that fewer records are valid ones.
        add_bos: begin with the tokenizer's bos ("alpaca" only).
        seq_len: tokens of a document in training; what goes beyond is counted, not cut.
        trust_remote_code: run the code of a tokenizer that is nothing else.
    Raises:
        DataError: a file is missing, malformed, without a record, or already there.
    """
    if not 0 <= valid_fraction < 1:
        raise DataError(f"--valid-fraction {valid_fraction} is not in [0, 1)")
    if seq_len is not None and seq_len < 1:
        raise DataError(f"--seq-len {seq_len}: must be at least 1")
    tokenizer = load_tokenizer(tokenizer_path, trust_remote_code=trust_remote_code)
    form = prompt_format(format_name, tokenizer, tokenizer_path, add_bos=add_bos, trust_remote_code=trust_remote_code)
    as_internevo = format_name == "internevo"
    numbers = [number for number, record in read_records(dataset) if record["output"] or as_internevo]
    if not numbers:
        raise DataError(f"{dataset}: no record with an output in it, so nothing is written")
    is_valid, num_valid = _split(len(numbers), valid_fraction, seed, as_internevo)
    name = "dataset" if as_internevo else dataset.name.partition(".")[0]
    outputs = [output / split / type_name / f"{name}.bin" for split in ("train", "valid")][: 2 if num_valid else 1]
    for path in outputs:
        if path.exists():
            raise DataError(f"{path} exists: choose another folder, or remove it")
    empty = _Numbers("records without an output, left out")
    kept = _kept_records(dataset, None if as_internevo else empty)
    writers = [TokenizedWriter(path) for path in outputs]
    report = _Report(seq_len, form.max_tokens)
    try:
        examples = encode_examples(kept, form, tokenizer)
        for index, (number, example) in enumerate(zip(numbers, examples, strict=True)):
            line = encode_masked_line(example.ids, example.learned)
            writers[is_valid(index)].write_line(line, len(example.ids))
            report.add(number, example)
        made_with = TokenizerRecord.of(
            tokenizer, tokenizer_path, add_bos=form.add_bos, add_eos=bool(form.end), format=format_name
        )
        for path, writer in zip(outputs, writers, strict=True):
            write_record(path, made_with)
            writer.close()
    except BaseException:
        for writer in writers:
            writer.discard()
        raise
    documents = [writer.num_documents for writer in writers] + [0]
    if valid_fraction and not num_valid:
        report.notices.append(f"no record is held out: {valid_fraction:g} of {len(numbers):,} is less than one")
    return AlpacaResult(
        documents[0],
        documents[1],
        sum(writer.num_tokens for writer in writers),
        report.targets,
        report.longest,
        [*form.notices, *report.notices, *(str(each) for each in (empty, *report.kinds) if each.count)],
    )


def read_records(dataset: Path) -> Iterator[tuple[int, Record]]:
    """The records of a file with their numbers, each with the texts "instruction", "input" and "output".

    Raises:
        DataError: the file is missing or malformed, or a record lacks a field; names its number.
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
                raise DataError(f"{place}: '{name}' is missing or not a text; it has {sorted(record)}")
            check_unicode(fields[name], f"{place}: '{name}'")
        yield number, {name: fields[name] for name in _FIELDS}


def _kept_records(dataset: Path, empty: _Numbers | None) -> Iterator[Record]:
    """The records; those without an output go to `empty`, or are kept if it is None."""
    for number, record in read_records(dataset):
        if empty is None or record["output"]:
            yield record
        else:
            empty.add(number)


def _split(count: int, fraction: float, seed: int | None, as_internevo: bool) -> tuple[Callable[[int], bool], int]:
    """Whether a record is a valid one, by its index, and how many draws there are."""
    if as_internevo:
        drawing = np.random.RandomState(_INTERNEVO_SEED if seed is None else seed)
        drawn = set(drawing.choice(count, int(count * fraction)).tolist())
        return lambda index: index in drawn, len(drawn)
    num_valid = round(count * fraction)
    key = _SEED if seed is None else seed
    return lambda index: bool(num_valid) and int(permute(np.array([index]), count, key)[0]) < num_valid, num_valid


class _Report:
    """What the examples have that their user should know."""

    def __init__(self, seq_len: int | None, max_tokens: int | None) -> None:
        self._seq_len = seq_len
        self.targets = self.longest = 0
        self.notices: list[str] = []
        beyond = f"--seq-len {seq_len}"
        self._cut = _Numbers(f"answers cut off, as examples of this format end at {max_tokens} tokens")
        self._cut_away = _Numbers(f"answers cut away: their prompts fill the {max_tokens} tokens of an example")
        self._unlabelled = _Numbers("examples without a label: nothing of them is learned")
        self._prompt_fills = _Numbers(f"prompts alone fill {beyond}, so that nothing is learned of their answers")
        self._answer_beyond = _Numbers(
            f"answers go beyond {beyond}: unpacked data cuts them there, packed data parts them from their prompt"
        )
        self.kinds = [self._unlabelled, self._cut, self._cut_away, self._prompt_fills, self._answer_beyond]

    def add(self, number: int, example: Example) -> None:
        self.targets += sum(example.learned)
        self.longest = max(self.longest, len(example.ids) + example.cut_tokens)
        labels = example.labels_within(None)
        if example.cut_tokens:
            (self._cut if example.has_answer else self._cut_away).add(number)
        if not labels:
            self._unlabelled.add(number)
        elif self._seq_len is not None and len(example.ids) > self._seq_len:
            kind = self._answer_beyond if example.labels_within(self._seq_len) else self._prompt_fills
            kind.add(number)
