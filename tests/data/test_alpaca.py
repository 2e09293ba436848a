"""Instruction data: what is masked, what is learned, and which record goes where."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from internlm.data.samples import FolderSamples
from internlm.data.tokenize.alpaca import tokenize_alpaca
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenize.train_bpe import train_bpe
from internlm.data.tokenized_file import TokenizedFile
from internlm.utils.errors import DataError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "alpaca_tokenizer.py"
RECORDS = [
    {"instruction": f"Add {i} and {i}.", "input": "in words" if i % 2 else "", "output": f"It is {2 * i}."}
    for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    train_bpe([json.dumps(RECORDS)] * 3, 300, path)
    return path


def split_documents(path, tokenizer):
    """(masked text, learned text) of every document."""
    file = TokenizedFile(path)
    found = []
    for index in range(len(file)):
        ids, loss_mask = file.read(index)
        prompt = int(loss_mask.argmax())
        assert loss_mask[prompt:].all() and not loss_mask[:prompt].any()
        found.append((tokenizer.decode(ids[:prompt].tolist()), tokenizer.decode(ids[prompt:].tolist())))
    return found


def test_prompts_are_masked_and_every_record_is_used_once(tmp_path, tokenizer_path):
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    command = [sys.executable, TOOL, tmp_path / "data.json", tmp_path / "out", tokenizer_path, "--split_ratio", "0.25"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "30 train and 10 valid documents" in done.stdout
    tokenizer = load_tokenizer(tokenizer_path)
    train = split_documents(tmp_path / "out" / "train" / "en" / "data.bin", tokenizer)
    valid = split_documents(tmp_path / "out" / "valid" / "en" / "data.bin", tokenizer)
    assert sorted(answer for _, answer in train + valid) == sorted(r["output"] + "<|endoftext|>" for r in RECORDS)
    by_answer = {record["output"] + "<|endoftext|>": record for record in RECORDS}
    for prompt, answer in train + valid:
        record = by_answer[answer]
        assert f"### Instruction:\n{record['instruction']}\n\n" in prompt and prompt.endswith("### Response:\n")
        assert ("### Input:\nin words\n\n" in prompt) == bool(record["input"])
    again = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert again.returncode == 2 and "exists" in again.stderr


def test_loader_learns_the_answers_only(tmp_path, tokenizer_path):
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
    result = tokenize_alpaca(tmp_path / "data.jsonl", tmp_path / "out", tokenizer_path, valid_fraction=0)
    assert result.train_documents == 40 and not (tmp_path / "out" / "valid").exists()
    samples = FolderSamples(tmp_path / "out" / "train", seq_len=512, micro_bsz=40, packing="unpacked", vocab_size=300)
    targets = (samples.sample(0).labels != -100).sum()
    assert len(samples) == 1 and targets == result.target_tokens


def test_split_depends_on_the_seed_only(tmp_path, tokenizer_path):
    (tmp_path / "data.json").write_text(json.dumps(RECORDS))
    found = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        tokenize_alpaca(tmp_path / "data.json", tmp_path / name, tokenizer_path, valid_fraction=0.25, seed=seed)
        found.append((tmp_path / name / "valid" / "en" / "data.bin").read_bytes())
    assert found[0] == found[1] != found[2]


def test_chat_template(tmp_path, tokenizer_path):
    folder = tmp_path / "chat"
    folder.mkdir()
    (folder / "tokenizer.json").write_bytes(tokenizer_path.read_bytes())
    config = json.loads(tokenizer_path.with_name("tokenizer_config.json").read_text())
    config["chat_template"] = (
        "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "data.json").write_text(json.dumps(RECORDS[1:2]))
    options = {"valid_fraction": 0, "chat_template": True}
    tokenize_alpaca(tmp_path / "data.json", tmp_path / "out", folder, **options)
    tokenizer = load_tokenizer(folder)
    found = split_documents(tmp_path / "out" / "train" / "en" / "data.bin", tokenizer)
    assert found == [("[user]Add 1 and 1.\nin words<|endoftext|>[assistant]", "It is 2.<|endoftext|>")]
    ids = TokenizedFile(tmp_path / "out" / "train" / "en" / "data.bin").read(0)[0].tolist()
    assert ids.count(1) == 2  # the special token is one id, not its letters
    config["chat_template"] = "{{ messages | length }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="does not continue its own generation prompt"):
        tokenize_alpaca(tmp_path / "data.json", tmp_path / "out2", folder, **options)
    assert not list((tmp_path / "out2").rglob("*.bin*"))
    with pytest.raises(DataError, match="has no chat template; leave out --chat-template"):
        tokenize_alpaca(tmp_path / "data.json", tmp_path / "out3", tokenizer_path, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"instruction": "a"}]',
            r"data\.json: record 0: 'output' is missing or not a text; it has \['instruction'\]",
        ),
        ('[{"instruction": "a", "output": "b"}, 5]', r"data\.json: record 1 is int"),
        ('[{"instruction": "a", "output": ""}]', r"data\.json: record 0: 'output' is empty"),
        ('[{"instruction": "a", "input": 1, "output": "b"}]', r"record 0: 'input' is missing or not a text"),
        ('[{"instruction": "a"', r"data\.json: not JSON at character"),
    ],
)
def test_bad_records_are_named(tmp_path, tokenizer_path, content, message):
    (tmp_path / "data.json").write_text(content)
    with pytest.raises(DataError, match=message):
        tokenize_alpaca(tmp_path / "data.json", tmp_path / "out", tokenizer_path)
    assert not list(tmp_path.rglob("*.bin*"))


def test_missing_file(tmp_path, tokenizer_path):
    with pytest.raises(DataError, match=r"none\.json: no such file"):
        tokenize_alpaca(tmp_path / "none.json", tmp_path / "out", tokenizer_path)
