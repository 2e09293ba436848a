"""Validation by the train command: named sets of several types, held-out documents, bits per byte."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.commands import metrics_of, start_ranks, start_training, write_config
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from internlm.data.documents.held_out import held_out_documents, num_held_out
from internlm.data.megatron_files.writer import MegatronWriter
from internlm.data.tokenized_files.writer import TokenizedWriter

WORDS = ("the", "naïve", "model", "reads", "中文", "text", "😀", "and", "writes")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """train/{en,cn}, web (Megatron) and code, of a byte-level tokenizer: (folder, texts by number)."""
    folder = tmp_path_factory.mktemp("corpus")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: id for id, piece in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(WORDS, random.integers(1, 9))) for _ in range(120)]
    eos = tokenizer.token_to_id("<|endoftext|>")
    ids = [[eos, *tokenizer.encode(text).ids, eos] for text in texts]
    for name, part in (("train/en/a", ids[:60]), ("train/cn/b", ids[60:90]), ("code/c", ids[90:110])):
        (folder / name).parent.mkdir(parents=True)
        with TokenizedWriter(folder / f"{name}.bin") as writer:
            for document in part:
                writer.write(document)
    with MegatronWriter(folder / "web.bin", np.dtype(np.uint16)) as megatron:
        for document in ids[110:]:
            megatron.write(np.array(document))
    return folder, texts


def config_of(folder: Path, corpus: Path, **keys: Any) -> Path:
    data = {"train_folder": str(corpus / "train"), "total_steps": 4, "valid_every": 2, "num_worker": 0}
    data |= {"tokenizer_path": str(corpus / "tokenizer.json"), **keys}
    return write_config(folder, f"model.update(vocab_size=300)\ndata.update({data!r})\n")


def train(folder: Path, config: Path, *arguments: object, run: str = "run") -> tuple[int, str, list[dict[str, Any]]]:
    """Exit code, output, and the numbers of each evaluation."""
    process = start_training(["--config", config, "--run-dir", folder / run, *arguments], folder / f"{run}.txt")
    code = process.wait()
    return code, process.output, evaluations_of(folder / run)


def evaluations_of(run_dir: Path) -> list[dict[str, float]]:
    lines = [{k: v for k, v in line.items() if k.startswith("val/")} for line in metrics_of(run_dir)]
    return [line for line in lines if line]


@pytest.mark.parametrize("packing", ["cut", "best_fit", "unpacked", "pack_sample_into_one"])
def test_bits_per_byte_of_named_and_held_out_sets(corpus: tuple[Path, list[str]], tmp_path: Path, packing: str) -> None:
    folder, texts = corpus
    named = {"code": str(folder / "code"), "web": {"path": str(folder / "web"), "type": "megatron"}}
    keys: dict[str, Any] = {"valid_folder": named, "valid_fraction": 0.1, "packing": packing}
    code, output, found = train(tmp_path, config_of(tmp_path, folder, **keys))
    assert code == 0, output
    sets = {"code": texts[90:110], "web": texts[110:]}
    for type_name, first, last in (("cn", 60, 90), ("en", 0, 60)):
        name = "b" if type_name == "cn" else "a"
        path = folder / "train" / type_name / f"{name}.bin"
        chosen = held_out_documents(last - first, num_held_out(last - first, 0.1, path, folder / "train"))
        assert 2 <= len(chosen) <= 7
        sets[f"held_out/{type_name}"] = [texts[first + int(document)] for document in chosen]
    assert len(found) == 2
    expected = {f"val/{name}_{kind}" for name in sets for kind in ("loss", "acc", "plex", "bpb")}
    assert all(line.keys() == expected for line in found)
    for line in found:
        for name, members in sets.items():
            num_bytes = sum(len(text.encode()) for text in members)
            num_labels = num_bytes + len(members)  # each byte is a token, and each document ends with eos
            bits = line[f"val/{name}_loss"] * num_labels / math.log(2)
            assert line[f"val/{name}_bpb"] == pytest.approx(bits / num_bytes, rel=1e-6)


def test_the_numbers_of_two_ranks_are_those_of_one(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = corpus
    keys: dict[str, Any] = {"valid_folder": {"code": str(folder / "code")}, "valid_fraction": 0.3}
    code, output, single = train(tmp_path / "one", config_of(tmp_path / "one", folder, **keys))
    assert code == 0, output
    config = config_of(tmp_path / "two", folder, **keys, micro_num=1)
    processes = start_ranks(["--config", config, "--run-dir", tmp_path / "two" / "run"], tmp_path / "two")
    assert [process.wait() for process in processes] == [0, 0], processes[0].output
    double = evaluations_of(tmp_path / "two" / "run")
    assert len(double) == len(single) == 2 and "val/held_out/en_bpb" in single[0]
    for ours, theirs in zip(double, single, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4)


def test_without_a_tokenizer_the_log_says_why(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = corpus
    config = config_of(tmp_path, folder, valid_fraction=0.1, tokenizer_path=None)
    code, output, found = train(tmp_path, config)
    assert code == 0 and output.count("no bits per byte (bpb): data.tokenizer_path is not set") == 1, output
    assert found and not any("bpb" in name for line in found for name in line)


def test_another_tokenizer_gives_no_number(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    """A smaller vocabulary than that of the data."""
    folder, _ = corpus
    spec = json.loads((folder / "tokenizer.json").read_text())
    spec["added_tokens"] = []
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    config = config_of(
        tmp_path, folder, valid_folder={"code": str(folder / "code")}, tokenizer_path=str(tmp_path / "tokenizer.json")
    )
    code, output, found = train(tmp_path, config)
    assert code == 0, output
    assert "'code' has no bits per byte (bpb)" in output and "token 256 is not in its vocabulary of 256" in output
    assert found and "val/code_loss" in found[0] and "val/code_bpb" not in found[0]


def test_a_resumed_run_holds_out_no_document_it_was_trained_on(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = corpus
    code, output, _ = train(tmp_path, config_of(tmp_path, folder, valid_fraction=0.1, total_steps=5))
    assert code == 0, output
    more = config_of(tmp_path, folder, valid_fraction=0.2, total_steps=6)
    code, output, _ = train(tmp_path, more, run="more")
    assert code == 2 and "data.valid_fraction = 0.2 holds out more documents" in output, output
    link = tmp_path / "link"
    link.symlink_to(folder / "train")
    for number, other in enumerate((f"{folder}/train/", f"{folder}/code/../train", str(link))):
        more = config_of(tmp_path, folder, valid_fraction=0.2, total_steps=6, train_folder=other)
        code, output, _ = train(tmp_path, more, run=f"spelling{number}")
        assert code == 2 and "data.valid_fraction = 0.2 holds out more documents" in output, output
    fewer = config_of(tmp_path, folder, valid_fraction=0.05, total_steps=6)
    code, output, found = train(tmp_path, fewer, run="fewer")
    assert code == 0 and "valid_fraction was 0.1, is 0.05" in output and found, output


def test_a_source_of_an_earlier_blend_holds_out_no_document(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = corpus
    blend = {"train_folder": None, "blend": [{"path": f"{folder}/train", "weight": 1}], "min_length_dict": None}
    code, output, _ = train(tmp_path, config_of(tmp_path, folder, **blend, valid_every=0, total_steps=5))
    assert code == 0, output
    code, output, _ = train(tmp_path, config_of(tmp_path, folder, valid_fraction=0.1, total_steps=6), run="alone")
    assert code == 2 and "data.valid_fraction = 0.1 holds out more documents" in output, output


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (
            {"valid_fraction": 0.1, "train_folder": None},
            "data.valid_fraction = 0.1 holds documents out of data.train_f",
        ),
        ({"valid_fraction": 1.0}, "data.valid_fraction = 1.0: it must be less than 1"),
        ({"valid_folder": {}}, "data.valid_folder = {}: it must be a folder, or a dict with at least one set"),
        ({"valid_folder": {"a": {"folder": "x"}}}, "its entry 'a': expected a path, or dict(path=..., type=...)"),
        ({"valid_folder": {"a": {"path": "x", "kind": 1}}}, "'kind' is not one of path, type, array_dtype"),
        ({"valid_folder": {"a": {"path": "x", "type": "parquet"}}}, "type = 'parquet' must be one of 'tokenized'"),
        ({"valid_folder": {"a": {"path": "x", "array_dtype": "uint16"}}}, "needs type = 'arrays', which is 'tokenize"),
        ({"valid_folder": {"a": "nowhere"}}, "nowhere: no such folder"),
    ],
)
def test_mistakes_are_named(corpus: tuple[Path, list[str]], tmp_path: Path, keys: Any, message: str) -> None:
    code, output, _ = train(tmp_path, config_of(tmp_path, corpus[0], **keys), "--dry-run")
    assert code == 2 and message in output, output


def test_a_set_of_the_name_of_the_held_out_one_is_refused(corpus: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = corpus
    keys = {"train_folder": str(folder / "train" / "en"), "valid_folder": {"held_out": str(folder / "code")}}
    code, output, _ = train(tmp_path, config_of(tmp_path, folder, valid_fraction=0.1, **keys), "--dry-run")
    assert code == 2 and "has a set 'held_out', and data.valid_fraction makes one of that name" in output, output


@pytest.mark.parametrize("train_type", ["streaming", "tokenized"])
def test_rows_are_a_validation_set_of_any_run(corpus: tuple[Path, list[str]], tmp_path: Path, train_type: str) -> None:
    folder, texts = corpus
    for name in ("rows/train", "rows_of_another/valid"):
        (tmp_path / name).parent.mkdir(parents=True)
        lines = [json.dumps({"text": text}) for text in texts[:30]]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    train_folder = tmp_path / "rows" if train_type == "streaming" else folder / "train"
    named = {
        "rows": {"path": str(tmp_path / "rows_of_another"), "type": "streaming"},
        "code": {"path": str(folder / "code"), "type": "tokenized"},
    }
    keys: dict[str, Any] = {"type": train_type, "train_folder": str(train_folder), "valid_folder": named}
    code, output, found = train(tmp_path, config_of(tmp_path, folder, **keys))
    assert code == 0, output
    num_bytes = sum(len(text.encode()) for text in texts[:30])
    # Rows end with eos and have no bos, so that the first byte of each is no label.
    firsts = len(texts[:30])
    for line in found:
        bits = line["val/rows_loss"] * num_bytes / math.log(2)
        assert line["val/rows_bpb"] == pytest.approx(bits / (num_bytes - firsts), rel=1e-6)
        assert "val/code_bpb" in line


@pytest.mark.parametrize("keys", ["folder", "file", "blend"])
def test_a_set_that_is_trained_on_is_named(corpus: tuple[Path, list[str]], tmp_path: Path, keys: str) -> None:
    train_folder = corpus[0] / "train"
    data: dict[str, Any] = {"valid_folder": str(train_folder)}
    if keys == "file":
        data["valid_folder"] = {"known": str(train_folder / "en" / "a.bin")}
    elif keys == "blend":
        data |= {"train_folder": None, "blend": [{"path": str(train_folder), "weight": 1}], "min_length_dict": None}
    code, output, _ = train(tmp_path, config_of(tmp_path, corpus[0], **data), "--dry-run")
    assert code == 0 and "of its files are trained on, such as" in output, output
    other = config_of(tmp_path, corpus[0], **{**data, "valid_folder": {"code": str(corpus[0] / "code")}})
    code, output, _ = train(tmp_path, other, "--dry-run")
    assert code == 0 and "trained on" not in output, output
