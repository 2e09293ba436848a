"""`internlm data`: tokenizes text; inspects, verifies, converts, merges, splits and shuffles tokenized files."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from internlm.commands.data_sample import print_sample
from internlm.commands.data_tokenize import add_tokenize
from internlm.data.megatron_files.reader import MegatronFile
from internlm.data.token_arrays.reader import RAW_DTYPES, TokenArray
from internlm.data.tokenized_files.tokenizer_record import TokenizerRecord, common_record, read_record
from internlm.data.tools.damage import FileReport, verify_files
from internlm.data.tools.input_documents import INPUT_FORMATS, PARQUET, Inputs, open_inputs
from internlm.data.tools.length_histogram import LengthHistogram
from internlm.data.tools.output_documents import DTYPES, OutputFormat, Written, write_documents
from internlm.data.tools.parquet_documents import read_parquet
from internlm.data.tools.rearrange import shuffled, split
from internlm.utils.errors import UserError
from internlm.utils.paths import local_path
from internlm.utils.text_table import text_table

_COUNT_BLOCK = 1 << 20
_SUFFIXES = {
    "tokenized": (".bin",),
    "megatron": (".bin",),
    "arrays": (".npy", ".bin", ".ds"),
    PARQUET: (".parquet",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions and their options."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    add_tokenize(actions)
    inputs = _input_options()
    output = _output_options()

    inspect = actions.add_parser(
        "inspect", help="show counts, lengths and samples", description=_inspect.__doc__, parents=[inputs]
    )
    inspect.add_argument("--png", type=local_path, metavar="FILE", help="also draw the histogram into this file")
    inspect.add_argument("--config", type=local_path, metavar="FILE.py", help="show a sample of this run instead")
    inspect.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    inspect.add_argument("--sample", type=int, metavar="N", help="with --config: the N-th global sample (from 0)")
    inspect.set_defaults(act=_inspect)

    verify = actions.add_parser(
        "verify",
        help="read everything, and name what is corrupt or out of range",
        description=f"{_verify.__doc__} Exits with 0 when there is no problem, else 1.",
        parents=[inputs],
    )
    verify.add_argument(
        "--vocab-size", type=int, metavar="N", help="ids must be smaller (default: that of the recorded tokenizer)"
    )
    verify.add_argument("--limit", type=int, default=20, metavar="N", help="problems shown of a file (default: 20)")
    verify.set_defaults(act=_verify)

    convert = actions.add_parser(
        "convert", help="write the documents in another format", description=_convert.__doc__, parents=[inputs, output]
    )
    convert.set_defaults(act=_convert)
    merge = actions.add_parser(
        "merge", help="write all documents into one file", description=_merge.__doc__, parents=[inputs, output]
    )
    merge.set_defaults(act=_merge)
    shuffle = actions.add_parser(
        "shuffle", help="write all documents in random order", description=_shuffle.__doc__, parents=[inputs, output]
    )
    shuffle.add_argument("--seed", type=int, default=1024, help="of the order (default: 1024)")
    shuffle.set_defaults(act=_shuffle)
    parts = actions.add_parser(
        "split", help="write several files of equal size", description=_split.__doc__, parents=[inputs, output]
    )
    parts.add_argument("--parts", type=int, required=True, metavar="N", help="number of files")
    parts.set_defaults(act=_split)


def _input_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("inputs", nargs="*", type=local_path, metavar="PATH", help="files, or folders of them")
    options.add_argument(
        "--from", dest="source", choices=INPUT_FORMATS, help="format of the inputs (default: detected)"
    )
    options.add_argument("--array-dtype", choices=RAW_DTYPES, help="dtype of raw arrays")
    options.add_argument("--array-separator", type=int, metavar="ID", help="id that ends a document of an array")
    return options


def _output_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument("--output", type=local_path, required=True, metavar="FILE", help="file to write")
    options.add_argument("--to", choices=INPUT_FORMATS, help="format of the output (default: that of the inputs)")
    options.add_argument(
        "--dtype", choices=DTYPES, help="of megatron and arrays (default: that of the inputs, or by vocabulary)"
    )
    options.add_argument("--vocab-size", type=int, metavar="N", help="chooses the dtype (default: the tokenizer's)")
    options.add_argument("--separator", type=int, metavar="ID", help="id that ends a document of a .npy or raw .bin")
    options.add_argument(
        "--drop-mask", action="store_true", help="let tokens without loss contribute loss where it cannot be marked"
    )
    return options


def run(options: argparse.Namespace) -> int:
    """Run the chosen action; returns the exit code."""
    return options.act(options)


# -- inspect -----------------------------------------------------------------------------------------------------------


def _inspect(options: argparse.Namespace) -> int:
    """Show documents, tokens and lengths of files by type, or a sample of a run as text."""
    if (options.config is None) != (options.sample is None):
        raise UserError("give --config FILE.py and --sample N together")
    if options.config is not None:
        if options.inputs or options.png:
            raise UserError("--config shows the data of the config: remove the paths and --png")
        return print_sample(options.config, options.overrides, options.sample, sys.stdout)
    if options.png is not None and options.png.is_dir():
        raise UserError(f"--png {options.png}: a folder; name the image to write in it, such as {options.png}/NAME.png")
    inputs = _open(options)
    by_type: dict[str, LengthHistogram] = {}
    files: dict[str, int] = {}
    for path, type_name in zip(inputs.paths, inputs.type_names, strict=True):
        _count(inputs, path, by_type.setdefault(type_name, LengthHistogram()))
        files[type_name] = files.get(type_name, 0) + 1
    total = LengthHistogram().merged(by_type.values())
    rows: list[tuple[str, ...]] = [("type", "files", "documents", "tokens", "share", "mean", "longest")]
    rows += [_row(name, files[name], each, total) for name, each in by_type.items()]
    if len(by_type) > 1:
        rows.append(_row("all", len(inputs.paths), total, total))
    print(f"{inputs.format_name}\n" + "\n".join(text_table(rows, "<>>>>>>")))
    print("\n" + "\n".join(total.text()))
    record = _record(inputs)
    if record is not None:
        print(f"\ntokenizer: {record.tokenizer}, {record.vocab_size:,} ids")
    if options.png is not None:
        total.draw(options.png)
        print(f"\nimage: {options.png}")
    return 0


def _count(inputs: Inputs, path: Path, histogram: LengthHistogram) -> None:
    import numpy as np

    if inputs.format is None:
        for ids, _ in read_parquet(path):
            histogram.add(np.array([len(ids)], dtype=np.int64))
        return
    file = inputs.open(path)
    for start in range(0, len(file), _COUNT_BLOCK):
        file.check_offsets(start, min(start + _COUNT_BLOCK, len(file)))
        histogram.add(file.counts(start, min(start + _COUNT_BLOCK, len(file))))


def _row(name: str, files: int, histogram: LengthHistogram, total: LengthHistogram) -> tuple[str, ...]:
    documents, tokens = int(histogram.documents.sum()), int(histogram.tokens.sum())
    share = tokens / max(int(total.tokens.sum()), 1)
    mean = tokens / max(documents, 1)
    return name, f"{files:,}", f"{documents:,}", f"{tokens:,}", f"{share:.1%}", f"{mean:,.1f}", f"{histogram.longest:,}"


# -- verify ------------------------------------------------------------------------------------------------------------


def _verify(options: argparse.Namespace) -> int:
    """Read every document, and name file, document and offset of what is corrupt or outside the vocabulary."""
    inputs = _open(options)
    record = _record(inputs)
    vocab_size = options.vocab_size or (record.vocab_size if record is not None else None)
    num_problems = 0
    for report in verify_files(inputs, vocab_size, options.limit):
        print(_verdict(report), flush=True)
        num_problems += report.num_problems
    if vocab_size is None:
        print("the largest id was not compared with a vocabulary: give --vocab-size")
    return 1 if num_problems else 0


def _verdict(report: FileReport) -> str:
    facts = [f"{report.documents:,} documents", f"{report.tokens:,} tokens", f"largest id {report.largest_id:,}"]
    facts += [f"{report.num_masked:,} without loss"] if report.num_masked else []
    facts += [f"{report.num_empty:,} empty documents"] if report.num_empty else []
    head = f"DAMAGED, {report.num_problems:,} problem(s); readable:" if report.num_problems else "good,"
    more = report.num_problems - len(report.problems)
    lines = [f"{report.path}: {head} {', '.join(facts)}", *(f"  {text}" for text in report.problems)]
    return "\n".join([*lines, *([f"  and {more:,} more"] if more else [])])


# -- convert, merge, shuffle, split ------------------------------------------------------------------------------------


def _convert(options: argparse.Namespace) -> int:
    """Write all documents of the inputs, in order, to one file of another format."""
    if options.to is None:
        raise UserError(f"give the format of the output: --to {' | '.join(INPUT_FORMATS)}")
    return _merge(options)


def _merge(options: argparse.Namespace) -> int:
    """Write all documents of the inputs, in order, to one file."""
    inputs = _open(options)
    output = _output(options, inputs)
    return _report([write_documents(options.output, inputs.documents(), output)], output)


def _shuffle(options: argparse.Namespace) -> int:
    """Write all documents of the inputs to one file, in an order that depends on nothing but them and the seed."""
    inputs = _open(options)
    output = _output(options, inputs)
    return _report([write_documents(options.output, shuffled(inputs, options.seed), output)], output)


def _split(options: argparse.Namespace) -> int:
    """Write the documents of the inputs, in order, to files NAME-00000-of-0000N with nearly equal numbers of tokens."""
    if options.parts < 1:
        raise UserError(f"--parts {options.parts}: must be at least 1")
    inputs = _open(options)
    output = _output(options, inputs)
    return _report(split(inputs, options.output, options.parts, output), output)


def _report(written: Sequence[Written], output: OutputFormat) -> int:
    for each in written:
        print(f"{each.path}: {each.documents:,} documents, {each.tokens:,} tokens")
    keys: dict[str, Any] = {"type": output.name}
    if output.name == "arrays":
        path = written[0].path
        keys |= {"array_dtype": output.dtype} if path.suffix != ".npy" else {}
        keys |= {"array_separator": output.separator} if path.suffix != ".ds" else {}
    if output.name != PARQUET:
        print("config: data = dict(" + ", ".join(f"{name}={value!r}" for name, value in keys.items()) + ", ...)")
    return 0


# -- shared ------------------------------------------------------------------------------------------------------------


def _open(options: argparse.Namespace) -> Inputs:
    if not options.inputs:
        raise UserError("name at least one file or folder")
    return open_inputs(options.inputs, options.source, options.array_dtype, options.array_separator)


def _record(inputs: Inputs) -> TokenizerRecord | None:
    return common_record({path: read_record(path) for path in inputs.paths})


def _output(options: argparse.Namespace, inputs: Inputs) -> OutputFormat:
    name = options.to or inputs.format_name
    if options.output.parent.is_file():
        raise UserError(f"--output {options.output}: {options.output.parent} is a file; name one in a folder")
    if options.output.is_dir():
        example = options.output / f"NAME{_SUFFIXES[name][0]}"
        raise UserError(f"--output {options.output}: a folder; name the file to write in it, such as {example}")
    if options.output.suffix not in _SUFFIXES[name]:
        raise UserError(f"--output {options.output}: files of '{name}' are named *{', *'.join(_SUFFIXES[name])}")
    record = _record(inputs)
    vocab_size = options.vocab_size
    if vocab_size is None and record is not None:
        vocab_size = record.vocab_size
    is_separated = name == "arrays" and options.output.suffix != ".ds"
    if options.separator is not None and not is_separated:
        raise UserError(
            f"--separator {options.separator} ends the documents of a .npy or raw .bin that is written, and the output "
            "needs none; for arrays that are read, give --array-separator"
        )
    candidates = (options.separator, options.array_separator, record.eos_id if record is not None else None)
    separator = next((each for each in candidates if each is not None), None)
    dtype = options.dtype or _default_dtype(name, inputs, vocab_size)
    return OutputFormat(name, dtype, separator, options.drop_mask, record)


def _default_dtype(name: str, inputs: Inputs, vocab_size: int | None) -> str:
    """The dtype that holds those of all inputs if they have some, else the smallest for the vocabulary."""
    import numpy as np

    opened = map(inputs.open, inputs.paths if inputs.format_name in ("megatron", "arrays") else ())
    dtypes = {file.dtype for file in opened if isinstance(file, MegatronFile | TokenArray)}
    common = np.result_type(*dtypes).name if dtypes else None
    if common is not None and (name == inputs.format_name or common == "uint16"):
        return common
    # 65,500 is Megatron's own limit of uint16.
    is_small = vocab_size is not None and vocab_size < 65_500
    return "uint16" if is_small else "int32" if name == "megatron" else "uint32"
