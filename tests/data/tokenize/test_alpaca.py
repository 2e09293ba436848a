"""Instruction data: masks, prompt formats, and the split of records."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from internlm.data.sources.document_source import DocumentSource
from internlm.data.tokenize.alpaca import tokenize_alpaca
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenize.train_bpe import train_bpe
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.tokenizer_record import common_record, tokenizer_records
from internlm.utils.errors import DataError

TOOL = Path(__file__).resolve().parents[3] / "tools" / "alpaca_tokenizer.py"
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
    """(masked text, text with loss) of every document."""
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
    samples = DocumentSource(
        tmp_path / "out" / "train",
        TOKENIZED,
        seq_len=512,
        micro_bsz=40,
        packing="unpacked",
        vocab_size=300,
    )
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
    options = {"valid_fraction": 0, "format_name": "chat-template"}
    tokenize_alpaca(tmp_path / "data.json", tmp_path / "out", folder, **options)
    tokenizer = load_tokenizer(folder)
    found = split_documents(tmp_path / "out" / "train" / "en" / "data.bin", tokenizer)
    assert found == [("[user]Add 1 and 1.\nin words<|endoftext|>[assistant]", "It is 2.<|endoftext|>")]
    ids = TokenizedFile(tmp_path / "out" / "train" / "en" / "data.bin").read(0)[0].tolist()
    assert ids.count(1) == 2  # the special token is one id, not its letters
    config["chat_template"] = "{{ messages | length }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(DataError, match="does not start with its generation prompt"):
        tokenize_alpaca(tmp_path / "data.json", tmp_path / "out2", folder, **options)
    assert not list((tmp_path / "out2").rglob("*.bin*"))
    with pytest.raises(DataError, match=r"has no chat template: put a chat_template.jinja into the folder"):
        tokenize_alpaca(tmp_path / "data.json", tmp_path / "out3", tokenizer_path, **options)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"instruction": "a"}]',
            r"data\.json: record 0: 'output' is missing or not text; it has \['instruction'\]",
        ),
        ('[{"instruction": "a", "output": "b"}, 5]', r"data\.json: record 1 is int"),
        ('[{"instruction": "a", "output": ""}]', r"data\.json: no record has an output"),
        ("[]", r"data\.json: no record has an output"),
        ('[{"instruction": "a", "output": "b"}] [5]', r"data\.json: .*after the '\]' that ends the array"),
        ('[{"instruction": "a", "output": "b\\udc00"}]', r"data\.json: record 0: 'output' has a lone surrogate"),
        ('[{"instruction": "a", "input": 1, "output": "b"}]', r"record 0: 'input' is missing or not text"),
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


# --- Records that are skipped, truncated or without a label are counted and named. ---


def tool(*arguments):
    return subprocess.run([sys.executable, str(TOOL), *map(str, arguments)], capture_output=True, text=True)


def test_skipped_and_unusable_records_are_named(tmp_path, tokenizer_path):
    records = [
        {"instruction": "short", "input": None, "output": "yes"},
        {"instruction": "nothing to learn", "output": ""},
        {"instruction": "long " * 300, "output": "never seen"},
        {"instruction": "short", "output": "a long answer " * 300},
    ]
    (tmp_path / "data.NDJSON").write_text("".join(json.dumps(record) + "\n" for record in records))
    options = {"valid_fraction": 0.1, "seq_len": 300}
    result = tokenize_alpaca(tmp_path / "data.NDJSON", tmp_path / "out", tokenizer_path, **options)
    notices = "\n".join(result.notices)
    assert "1 records without an output, skipped: record 1" in notices
    assert "1 prompts fill --seq-len 300, so nothing of their answers is learned: record 2" in notices
    assert "1 answers exceed --seq-len 300" in notices and "their prompt: record 3" in notices
    assert "no record for validation: 0.1 of 3 is less than one" in notices
    file = TokenizedFile(tmp_path / "out" / "train" / "en" / "data.bin")
    assert len(file) == result.train_documents == 3 and result.longest == max(file.counts())
    samples = DocumentSource(
        tmp_path / "out" / "train",
        TOKENIZED,
        seq_len=300,
        micro_bsz=1,
        packing="unpacked",
        vocab_size=300,
    )
    labels = [int((samples.sample(index).labels != -100).sum()) for index in range(3)]
    assert sorted(labels)[0] == 0 and sum(label == 0 for label in labels) == 1  # the loader agrees on record 2


def test_the_tool_keeps_the_record_of_its_tokenizer(tmp_path, tokenizer_path):
    (tmp_path / "data.json.gz").write_bytes(gzip.compress(json.dumps(RECORDS).encode()))
    done = tool(tmp_path / "data.json.gz", tmp_path / "out", tokenizer_path, "--seq-len", 512)
    assert done.returncode == 0 and not done.stderr, done.stderr
    records = tokenizer_records(tmp_path / "out")
    assert [path.name for path in records] == ["data.bin", "data.bin"]
    assert common_record(records).format == "alpaca" and common_record(records).add_eos


# --- InternEvo's tool, restated from its format. ---


@pytest.fixture(scope="module")
def sentencepiece_path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "text.txt").write_text("\n".join(f"{r['instruction']} {r['input']} {r['output']}" for r in RECORDS))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "m"), vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    return folder / "m.model"


def internevo_document(record, model):
    """Signed ids: the prompt is negative, a turn ends with a special token and a newline; 2047 ids, then eos."""
    question = record["instruction"] if record["input"] == "" else record["instruction"] + "\n" + record["input"]
    asked = [*model.encode(f"<|User|>:{question}"), 103167, 13, *model.encode("<|Bot|>:")]
    answered = [*model.encode(record["output"]), 103166, 13]
    return [*[model.bos_id(), *(-id for id in asked), *answered][:2047], model.eos_id()]


def signed_documents(path):
    return [json.loads(line)["tokens"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("ratio", [None, 0.3])
def test_internevo_format_split_and_names(tmp_path, sentencepiece_path, ratio):
    records = [*RECORDS, {"instruction": "x " * 3000, "input": "", "output": "gone"}]
    records += [
        {"instruction": "x", "input": "", "output": "y " * 3000},
        {"instruction": "x", "input": "", "output": ""},
    ]
    (tmp_path / "alpaca.json").write_text(json.dumps(records))
    split = [] if ratio is None else ["--split_ratio", ratio]
    done = tool(tmp_path / "alpaca.json", tmp_path / "out", sentencepiece_path, "--prompt-format", "internevo", *split)
    assert done.returncode == 0, done.stderr
    model = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_path))
    documents = [internevo_document(record, model) for record in records]
    np.random.seed(0)
    held_out = np.random.choice(range(len(records)), int(len(records) * (ratio or 0.1))).tolist()
    for name, is_mine in (("train", lambda i: i not in held_out), ("valid", lambda i: i in held_out)):
        path = tmp_path / "out" / name / "en" / "dataset.bin"
        assert signed_documents(path) == [document for i, document in enumerate(documents) if is_mine(i)]
        file = TokenizedFile(path)
        assert file.counts().tolist() == [len(document) for document in signed_documents(path)]
    assert "1 answers truncated at the 2048 tokens of an example in this format: record 41" in done.stderr
    assert "1 answers lost: their prompts fill the 2048 tokens of an example: record 40" in done.stderr
    assert f"<eoh> 103167, <eoa> 103166: InternEvo's ids, beyond its {model.vocab_size()}" in done.stderr
    assert "model.vocab_size >= 103168" in done.stderr


def test_internevo_format_takes_the_ids_that_the_tokenizer_has(tmp_path, sentencepiece_path):
    folder = sentencepiece_path.parent
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "own"), vocab_size=300, model_type="bpe",
        byte_fallback=True, hard_vocab_limit=False, minloglevel=2, user_defined_symbols="<eoa>,<eoh>",
    )  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(RECORDS[:1]))
    options = {"valid_fraction": 0, "format_name": "internevo"}
    result = tokenize_alpaca(tmp_path / "a.json", tmp_path / "out", folder / "own.model", **options)
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "own.model"))
    own = {name: model.piece_to_id(name) for name in ("<eoa>", "<eoh>", "<0x0A>")}
    [document] = signed_documents(tmp_path / "out" / "train" / "en" / "dataset.bin")
    assert -own["<eoh>"] in document and document[-3:] == [own["<eoa>"], own["<0x0A>"], model.eos_id()]
    assert f"<eoh> {own['<eoh>']} for 103167" in "\n".join(result.notices)
