"""Conversations to tokenized files: every format and number of processes, with the masks of each row."""

import json
import re

import pyarrow
import pyarrow.parquet
import pytest
from helpers.chat_templates import CHATML, LLAMA3, save_chat_tokenizer, write_rows
from helpers.pages import blocks, commands, text_of

from internlm.cli import main as internlm
from internlm.config.loader import load_config
from internlm.data.conversations.chat_template import load_chat_template
from internlm.data.conversations.encoder import ConversationEncoder, ConversationOptions
from internlm.data.conversations.row_forms import FORMS
from internlm.data.sources.open_source import open_source
from internlm.data.tokenize import pipeline
from internlm.data.tokenize.command import main
from internlm.data.tokenize.pipeline import TokenizeOptions, tokenize
from internlm.data.tokenize.text_tokenizer import load_tokenizer
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.tokenizer_record import read_record
from internlm.utils.errors import DataError

ROWS = [
    {
        "messages": [
            {"role": "user", "content": f"What is the sum of {i} and two?"},
            {"role": "assistant", "content": f"The answer is {i + 2}."},
            {"role": "user", "content": "Sure?"},
            {"role": "assistant", "content": "yes" * (i % 5 + 1)},
        ]
    }
    for i in range(120)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_chat_tokenizer(tmp_path_factory.mktemp("chat") / "chatml", CHATML)


def expected(folder, rows, **options):
    encoder = ConversationEncoder(load_tokenizer(folder), load_chat_template(folder), ConversationOptions(**options))
    found = [encoder.encode(row, "row") for row in rows]
    return [(each.ids, each.loss_mask) for each in found]


def documents(path):
    file = TokenizedFile(path)
    return [(ids.tolist(), mask.tolist()) for ids, mask in (file.read(i) for i in range(len(file)))]


def run(output, inputs, folder, **options):
    options = {"conversations": ConversationOptions(), **options}
    return tokenize(TokenizeOptions(tuple(map(str, inputs)), output, folder, **options))


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("processes", [1, 2])
def test_files_have_the_masks_of_every_row(tmp_path, folder, monkeypatch, kind, processes):
    monkeypatch.setattr(pipeline, "_SHARD_BYTES", (4000, 4000))
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        write_rows(path, ROWS)
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        table = pyarrow.Table.from_pylist([row | {"id": 1} for row in ROWS])
        pyarrow.parquet.write_table(table, path, row_group_size=25)
    result = run(tmp_path / "x.bin", [path], folder, processes=processes)
    assert documents(tmp_path / "x.bin") == expected(folder, ROWS)
    assert result.documents == 120 and not result.notices
    record = read_record(tmp_path / "x.bin")
    assert record.format.startswith("conversations, template ") and not record.add_bos and not record.add_eos


def test_columns_that_are_null_in_parquet_do_not_change_a_row(tmp_path, folder):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    calling = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "tool_calls": [call]}]}
    rows = [ROWS[0], calling, ROWS[1]]
    schema = pyarrow.Table.from_pylist([calling, *ROWS[:2]]).schema
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), tmp_path / "rows.parquet")
    run(tmp_path / "x.bin", [tmp_path / "rows.parquet"], folder)
    assert documents(tmp_path / "x.bin") == expected(folder, rows)


def test_bad_rows_stop_the_run_or_are_counted(tmp_path, folder, capsys):
    rows = [ROWS[0], {"messages": [{"role": "user", "content": 5}]}, ROWS[1], {"messages": ROWS[0]["messages"][:1]}]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    offset = len(json.dumps(ROWS[0])) + 1
    message = rf"rows\.jsonl: the record at byte {offset}: 'messages', message 0: 'content': expected a text"
    with pytest.raises(DataError, match=message):
        run(tmp_path / "x.bin", [path], folder)
    assert not (tmp_path / "x.bin").exists()
    result = run(tmp_path / "x.bin", [path], folder, on_bad_data="skip")
    assert documents(tmp_path / "x.bin") == expected(folder, ROWS[:2])
    skipped, first = result.notices
    assert skipped == "skipped 1 conversations without an answer to learn from, 1 rows that cannot be used"
    assert first.startswith("the first of the rows that cannot be used: ") and f"byte {offset}" in first
    broken = tmp_path / "broken.jsonl"
    broken.write_text("{broken\n" + path.read_text())
    with pytest.raises(DataError, match=r"broken\.jsonl: .*JSON"):
        run(tmp_path / "b.bin", [broken], folder)
    result = run(tmp_path / "b.bin", [broken], folder, on_bad_data="skip")
    assert documents(tmp_path / "b.bin") == expected(folder, ROWS[:2])
    assert "2 rows that cannot be used" in result.notices[0] and "broken.jsonl" in result.notices[1]
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(DataError, match=r"other\.parquet: row 0 is not a conversation: its columns are \['a'\]"):
        run(tmp_path / "z.bin", [tmp_path / "other.parquet"], folder)
    path = write_rows(tmp_path / "none.jsonl", rows[3:])
    with pytest.raises(
        DataError, match="the input has no conversation to learn from, so nothing is written; skipped 1"
    ):
        run(tmp_path / "y.bin", [path], folder)


def test_validation_rows_append_and_other_templates(tmp_path, folder):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    valid = {"valid_fraction": 0.3, "valid_output": tmp_path / "valid.bin"}
    run(tmp_path / "x.bin", [path], folder, **valid)
    train, held_out = documents(tmp_path / "x.bin"), documents(tmp_path / "valid.bin")
    key = str
    assert sorted(train + held_out, key=key) == sorted(expected(folder, ROWS), key=key) and 15 < len(held_out) < 60
    run(tmp_path / "x.bin", [path], folder, append=True)
    assert documents(tmp_path / "x.bin") == train + expected(folder, ROWS)
    (tmp_path / "own.jinja").write_text(LLAMA3)
    other = ConversationOptions(chat_template=str(tmp_path / "own.jinja"))
    with pytest.raises(DataError, match=r"made with other settings .*: format conversations, template \w+ against"):
        run(tmp_path / "x.bin", [path], folder, append=True, conversations=other)


def test_an_interrupted_run_continues_with_the_same_options_only(tmp_path, folder, monkeypatch):
    monkeypatch.setattr(pipeline, "_SHARD_BYTES", (4000, 4000))
    path = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"messages": 5}])
    with pytest.raises(DataError, match="'messages': expected a list"):
        run(tmp_path / "x.bin", [path], folder)
    for options in ({"conversations": ConversationOptions(learn="last")}, {"conversations": None}):
        with pytest.raises(DataError, match=r"interrupted run with other .*options of conversations"):
            run(tmp_path / "x.bin", [path], folder, **options)
    run(tmp_path / "x.bin", [path], folder, on_bad_data="skip", restart=True)
    assert documents(tmp_path / "x.bin") == expected(folder, ROWS)


def test_command_line(tmp_path, folder, capsys):
    path = write_rows(tmp_path / "rows.jsonl", ROWS)
    arguments = [str(path), "--tokenizer", str(folder), "--processes", "1", "--output", str(tmp_path / "x.bin")]
    assert main([*arguments, "--conversations", "--learn", "last", "--mask", "prefix"]) == 0
    assert documents(tmp_path / "x.bin") == expected(folder, ROWS, learn="last")
    assert "120 documents" in capsys.readouterr().out
    (tmp_path / "rows.txt").write_text("text")
    text = [str(tmp_path / "rows.txt"), *arguments[1:-1], str(tmp_path / "y.bin")]
    for wrong, message in (
        ([*arguments, "--learn", "last"], "--learn belongs to conversations: add --conversations"),
        ([*arguments, "--conversations", "--whole-files"], "--whole-files belongs to texts"),
        ([*arguments[:-1], str(tmp_path / "y.bin"), "--conversations", "--eos"], "bos and eos of the chat template"),
        ([*arguments[:-1], str(tmp_path / "y.bin"), "--conversations", "alpaca"], "no 'instruction', which the form"),
        ([*text, "--conversations"], "txt files have no columns"),
        ([*arguments[:-1], str(tmp_path / "y.bin")], "Or tokenize conversations: add --conversations"),
    ):
        assert main(wrong) == 2
        assert message in capsys.readouterr().err, wrong


def test_the_page_on_data(tmp_path, monkeypatch, capsys):
    """The section on conversations as a user follows it: its command, its forms, its config."""
    section = text_of("doc/data.md").split("\n### Conversations\n")[1].split("\n### ")[0]
    monkeypatch.chdir(tmp_path)
    folder = save_chat_tokenizer(tmp_path / "my_tokenizer", CHATML)
    forms = [json.loads(row) for row in re.findall(r"^\| `\w+` \| `(.+?)`", section, re.MULTILINE)]
    assert len(forms) == len(FORMS)
    write_rows(tmp_path / "chats.jsonl", forms)
    (command,) = commands(section)
    assert command[0] == "internlm" and internlm([*command[1:], "--processes", "1"]) == 0
    assert "5 documents" in capsys.readouterr().out
    assert documents(tmp_path / "data/chats/train/en/chats.bin") == expected(folder, forms)
    (source,) = blocks(section, "python")
    model = {"vocab_size": 600, "hidden_size": 8, "num_layers": 1, "num_attention_heads": 1, "dtype": "torch.float32"}
    (tmp_path / "config.py").write_text(f"model = {model}\n{source}")
    data = load_config(tmp_path / "config.py").config.data
    samples = open_source(data.train_folder, seq_len=64, micro_bsz=5, packing="unpacked", vocab_size=600)
    labels = sum(sum(mask[1:]) for _, mask in expected(folder, forms))
    assert (samples.sample(0).labels != -100).sum() == labels
