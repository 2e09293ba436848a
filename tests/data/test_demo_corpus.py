"""The corpus of the demo: made once, of real text, with the numbers that the demo prints."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from internlm.data.demo_corpus import DemoSettings, prepare_demo_corpus
from internlm.data.documents.unigram_entropy import token_counts, unigram_entropy
from internlm.data.documents.valid_sets import folder_sets
from internlm.data.loaders.train_loader import build_train_loader
from internlm.data.loaders.valid_loader import build_valid_loaders
from internlm.data.sources.open_source import open_source
from internlm.data.sources.sample_stream import ShuffledSource
from internlm.data.tokenize.fingerprint import tokenizer_fingerprint
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.tokenizer_record import common_record, tokenizer_records
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.utils.errors import DataError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "prepare_demo_data.py"


def test_unigram_entropy(tmp_path):
    assert unigram_entropy(np.array([4, 0, 4, 4, 4])) == pytest.approx(math.log(4))
    assert unigram_entropy(np.array([0, 7])) == 0
    with TokenizedWriter(tmp_path / "a.bin") as writer:
        writer.write([0, 2, -2])
        writer.write([1])
    assert token_counts([TokenizedFile(tmp_path / "a.bin", 4)], 4).tolist() == [1, 1, 2, 0]


def test_corpus_is_prepared_once(tmp_path):
    command = [sys.executable, TOOL, "--out", tmp_path / "demo", "--max-bytes", "1e6", "--vocab", "600"]
    command = [*map(str, command), "--processes", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    facts = json.loads((tmp_path / "demo" / "corpus.json").read_text())
    assert 950_000 < facts["bytes"] <= 1_000_000
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == [
        "corpus.json", "tokenizer.json", "tokenizer_config.json", "train", "valid",
    ]  # fmt: skip
    tokenizer = load_tokenizer(tmp_path / "demo" / "tokenizer.json")
    made_with = common_record(tokenizer_records(tmp_path / "demo"))
    assert made_with.tokenizer == str(tmp_path / "demo" / "tokenizer.json")
    assert made_with.fingerprint == tokenizer_fingerprint(tokenizer)
    size = tokens = documents = 0
    for path in (tmp_path / "demo").rglob("*.bin"):
        file = TokenizedFile(path, 600)
        for index in range(len(file)):
            ids = file.read(index)[0].tolist()
            assert ids[-1] == tokenizer.eos_id
            size += len(tokenizer.decode(ids[:-1]).encode())
            tokens += len(ids)
            documents += 1
    assert (size, tokens, documents) == (facts["bytes"], facts["tokens"], facts["documents"])
    assert facts["train_tokens"] + facts["valid_tokens"] == tokens
    assert 4 < facts["unigram_entropy"] < math.log(600)
    source = open_source(tmp_path / "demo" / "train", seq_len=64, micro_bsz=2, packing="cut", vocab_size=600)
    loader = build_train_loader(ShuffledSource(source, seed=1), micro_num=1)
    assert loader.type_names == ["packages", "python"]
    assert next(loader).num_tokens == 128
    loader.close()
    sets = folder_sets(tmp_path / "demo" / "valid", TOKENIZED)
    assert build_valid_loaders(sets, seq_len=64, micro_bsz=2, vocab_size=600)
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "already prepared" in again.stdout
    with pytest.raises(DataError, match=r"is a demo corpus made with .*'vocab_size': 600.*choose another --out"):
        prepare_demo_corpus(tmp_path / "demo", DemoSettings(1_000_000, 700), 1)


def test_a_folder_with_other_content_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(DataError, match="exists and is not a demo corpus"):
        prepare_demo_corpus(tmp_path, DemoSettings(), 1)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
