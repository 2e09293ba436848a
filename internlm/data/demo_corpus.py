"""The demo's corpus: real text that is on every machine with Python, made without a network.

Two types: `python`, the standard library, and `packages`, documentation and code of installed packages, those rich in
prose first. Owns the choice of files; tokenizer and tokenizing are the same as for any other text.
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

from internlm.data.tokenize.input_files import find_inputs
from internlm.data.tokenize.pipeline import TokenizeOptions, tokenize
from internlm.data.tokenize.text_inputs import TextOptions
from internlm.data.tokenize.train_bpe import sample_texts, train_bpe
from internlm.data.tokenized_files.tokenizer_record import read_record, write_record
from internlm.data.tokenized_files.unigram_entropy import token_counts, unigram_entropy
from internlm.utils.errors import DataError

_HELD_OUT_EVERY = 80
"""Of this many documents the first is held out."""
_SPLITS = ("train", "valid")
_TRAIN_BYTES = 8_000_000
_SMALLEST, _LARGEST = 1_000, 1_000_000
"""Bytes of a file: smaller ones say little, larger ones are mostly generated tables."""
_MIN_PROSE = 0.15
_PROSE = re.compile(r'""".*?"""|\'\'\'.*?\'\'\'|^\s*#.*?$', re.DOTALL | re.MULTILINE)
_SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "testing", "encodings", "lib2to3"}
_PROSE_SUFFIXES = {".md", ".rst", ".txt"}


@dataclass(frozen=True)
class DemoSettings:
    """What the corpus depends on; a corpus made with others is not taken for it.

    Attributes:
        max_bytes: bytes of text over both types.
        vocab_size: ids of the BPE tokenizer that is trained on it.
    """

    max_bytes: int = 24_000_000
    vocab_size: int = 4096


def prepare_demo_corpus(folder: Path, settings: DemoSettings, processes: int) -> tuple[dict[str, Any], bool]:
    """Make the corpus in `folder`, whole or not at all.

    Layout: `train/<type>/<type>.bin`, `valid/<type>/<type>.bin`, `tokenizer.json`, `corpus.json`.

    Returns:
        (the contents of corpus.json, whether it was made now rather than found).
    Raises:
        DataError: the folder holds something else, or a corpus with other settings.
    """
    facts_path = folder / "corpus.json"
    if facts_path.is_file():
        facts = json.loads(facts_path.read_text())
        if facts["settings"] != asdict(settings):
            raise DataError(
                f"{folder} holds a demo corpus made with {facts['settings']}, not {asdict(settings)}: remove it, or "
                "choose another --out"
            )
        return facts, False
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
        # The folder is renamed at the end, and the tokenizer with it.
        if record := read_record(output):
            write_record(output, replace(record, tokenizer=str((folder / tokenizer.name).resolve())))
    facts = _facts(work, settings)
    (work / "corpus.json").write_text(json.dumps(facts, indent=1) + "\n")
    shutil.rmtree(work / "text")
    if folder.exists():
        folder.rmdir()
    os.replace(work, folder)
    return facts, True


def _facts(work: Path, settings: DemoSettings) -> dict[str, Any]:
    documents = size = 0
    for path, _ in find_inputs([work / "text"]).files:
        with open(path, encoding="utf-8") as lines:
            for line in lines:
                documents += 1
                size += len(json.loads(line)["text"].encode())
    train = token_counts(sorted((work / "train").rglob("*.bin")), settings.vocab_size)
    valid = token_counts(sorted((work / "valid").rglob("*.bin")), settings.vocab_size)
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
    """Write distinct texts up to `max_bytes` as JSON lines, in train and valid; returns the bytes of text."""
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
            if size > max_bytes - _SMALLEST:
                break
    return size


def _standard_library() -> Iterator[str]:
    for path in _files(Path(sysconfig.get_paths()["stdlib"]), {".py", *_PROSE_SUFFIXES}):
        text = _read(path)
        if text is not None:
            yield text


def _packages() -> Iterator[str]:
    """Documentation, then code rich in comments and docstrings, then other code."""
    roots = sorted({Path(sysconfig.get_paths()[name]) for name in ("purelib", "platlib")})
    prose = [path for root in roots for path in _files(root, _PROSE_SUFFIXES)]
    prose += [path for root in roots for path in sorted(root.glob("*.dist-info/METADATA"))]
    code = [path for root in roots for path in _files(root, {".py"})]
    # A fixed order that mixes packages, so that a corpus bounded in size has something of each.
    code.sort(key=lambda path: hashlib.blake2b("/".join(path.parts[-3:]).encode()).digest())
    for path in prose:
        text = _read(path)
        if text is not None:
            yield text
    poor = []
    for path in code:
        text = _read(path)
        if text is None:
            continue
        if sum(map(len, _PROSE.findall(text))) < _MIN_PROSE * len(text):
            poor.append(path)
            continue
        yield text
    for path in poor:
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
    """The text of a file; None if it is too small, too large or not UTF-8."""
    try:
        if not _SMALLEST <= path.stat().st_size <= _LARGEST:
            return None
        return path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return None
