"""The corpus of the demo: text that every machine with Python has, without a network.

Two types: `python`, the standard library, and `packages`, the documentation and code of installed packages, prose
first. Owns the choice of files; they are tokenized like any other text.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sysconfig
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from internlm.data.documents.unigram_entropy import token_counts, unigram_entropy
from internlm.data.tokenize.input_files import find_inputs
from internlm.data.tokenize.pipeline import TokenizeOptions, tokenize
from internlm.data.tokenize.text_inputs import TextOptions
from internlm.data.tokenize.train_bpe import sample_texts, train_bpe
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.tokenizer_record import read_record, write_record
from internlm.utils.errors import DataError

_HELD_OUT_EVERY = 80
"""The first of this many documents is held out for validation."""
_SPLITS = ("train", "valid")
_TRAIN_BYTES = 8_000_000
_MIN_BYTES, _MAX_BYTES = 1_000, 1_000_000
"""Limits of the size of a file in bytes: larger files are mostly generated tables."""
_MIN_PROSE = 0.15
_PROSE = re.compile(r'""".*?"""|\'\'\'.*?\'\'\'|^\s*#.*?$', re.DOTALL | re.MULTILINE)
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "encodings", "lib2to3"}
_PROSE_SUFFIXES = {".md", ".rst", ".txt"}


@dataclass(frozen=True)
class DemoSettings:
    """Settings of the corpus; a corpus made with other settings is refused.

    Attributes:
        max_bytes: maximum bytes of text, over both types.
        vocab_size: number of ids of the BPE tokenizer that is trained on the corpus.
    """

    max_bytes: int = 24_000_000
    vocab_size: int = 4096


def prepare_demo_corpus(folder: Path, settings: DemoSettings, processes: int) -> tuple[dict[str, Any], bool]:
    """Make the corpus in `folder`, atomically, unless it exists.

    Layout: `train/<type>/<type>.bin`, `valid/<type>/<type>.bin`, `tokenizer.json`, `corpus.json`.

    Args:
        folder: the folder to make.
        settings: settings of the corpus.
        processes: number of worker processes.

    Returns:
        (contents of corpus.json, whether the corpus was made by this call).

    Raises:
        DataError: the folder has other content, or a corpus with other settings.
    """
    summary_path = folder / "corpus.json"
    if summary_path.is_file():
        summary = json.loads(summary_path.read_text())
        if summary["settings"] != asdict(settings):
            raise DataError(
                f"{folder} is a demo corpus made with {summary['settings']}, not {asdict(settings)}: remove it, or "
                "choose another --out"
            )
        return summary, False
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not a demo corpus: remove it, or choose another --out")
    work = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    for split in _SPLITS:
        (work / "text" / split).mkdir(parents=True)
    written = _write_text(work / "text", "python", _standard_library(), settings.max_bytes // 2)
    _write_text(work / "text", "packages", _packages(), settings.max_bytes - written)
    tokenizer = work / "tokenizer.json"
    files = find_inputs([work / "text" / "train"]).files
    train_bpe(sample_texts(files, TextOptions(), _TRAIN_BYTES), settings.vocab_size, tokenizer)
    for path, _ in find_inputs([work / "text"]).files:
        output = work / path.parent.name / path.stem / f"{path.stem}.bin"
        output.parent.mkdir(parents=True)
        tokenize(TokenizeOptions((str(path),), output, tokenizer, processes=processes))
        # The record names the tokenizer by its path after the final rename of the folder.
        if record := read_record(output):
            write_record(output, replace(record, tokenizer=str((folder / tokenizer.name).resolve())))
    summary = _summarize(work, settings)
    (work / "corpus.json").write_text(json.dumps(summary, indent=1) + "\n")
    shutil.rmtree(work / "text")
    if folder.exists():
        folder.rmdir()
    os.replace(work, folder)
    return summary, True


def _opened(folder: Path, vocab_size: int) -> list[TokenizedFile]:
    return [TokenizedFile(path, vocab_size) for path in sorted(folder.rglob("*.bin"))]


def _summarize(work: Path, settings: DemoSettings) -> dict[str, Any]:
    documents = size = 0
    for path, _ in find_inputs([work / "text"]).files:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                documents += 1
                size += len(json.loads(line)["text"].encode())
    train = token_counts(_opened(work / "train", settings.vocab_size), settings.vocab_size)
    valid = token_counts(_opened(work / "valid", settings.vocab_size), settings.vocab_size)
    tokens = int(train.sum() + valid.sum())
    return {
        "settings": asdict(settings),
        "documents": documents,
        "bytes": size,
        "tokens": tokens,
        "train_tokens": int(train.sum()),
        "valid_tokens": int(valid.sum()),
        "bytes_per_token": size / tokens,
        "unigram_entropy": unigram_entropy(train),
    }


def _write_text(folder: Path, name: str, texts: Iterator[str], max_bytes: int) -> int:
    """Write distinct texts, up to `max_bytes`, as JSON lines of train and valid; returns the bytes written."""
    seen: set[bytes] = set()
    size = 0
    paths = [folder / split / f"{name}.jsonl" for split in _SPLITS]
    with open(paths[0], "w", encoding="utf-8") as train, open(paths[1], "w", encoding="utf-8") as valid:
        for text in texts:
            digest = hashlib.blake2b(text.encode(), digest_size=16).digest()
            if digest in seen or size + len(text.encode()) > max_bytes:
                continue
            file = train if len(seen) % _HELD_OUT_EVERY else valid
            seen.add(digest)
            size += len(text.encode())
            file.write(json.dumps({"text": text}) + "\n")
            if size > max_bytes - _MIN_BYTES:
                break
    return size


def _standard_library() -> Iterator[str]:
    for path in _files(Path(sysconfig.get_paths()["stdlib"]), {".py", *_PROSE_SUFFIXES}):
        text = _read(path)
        if text is not None:
            yield text


def _packages() -> Iterator[str]:
    """Iterate over documentation, then code rich in comments and docstrings, then other code."""
    roots = sorted({Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")})
    prose = [path for root in roots for path in _files(root, _PROSE_SUFFIXES)]
    prose += [path for root in roots for path in sorted(root.glob("*.dist-info/METADATA"))]
    code = [path for root in roots for path in _files(root, {".py"})]
    # A fixed order that mixes packages, so that a corpus of limited size has text of many.
    code.sort(key=lambda path: hashlib.blake2b("/".join(path.parts[-3:]).encode()).digest())
    for path in prose:
        text = _read(path)
        if text is not None:
            yield text
    with_little_prose = []
    for path in code:
        text = _read(path)
        if text is None:
            continue
        if sum(map(len, _PROSE.findall(text))) < _MIN_PROSE * len(text):
            with_little_prose.append(path)
            continue
        yield text
    for path in with_little_prose:
        text = _read(path)
        if text is not None:
            yield text


def _files(root: Path, suffixes: set[str]) -> Iterator[Path]:
    for folder, subfolders, names in os.walk(root):
        skipped = _SKIPPED_FOLDERS | {name for name in subfolders if name.endswith(".dist-info")}
        subfolders[:] = sorted(set(subfolders) - skipped)
        for name in sorted(names):
            if Path(name).suffix in suffixes:
                yield Path(folder, name)


def _read(path: Path) -> str | None:
    """Read a file; None if it is too small, too large or not UTF-8."""
    try:
        if not _MIN_BYTES <= path.stat().st_size <= _MAX_BYTES:
            return None
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
