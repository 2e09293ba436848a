"""`internlm data`: what it counts, finds damaged, converts, merges, splits and shuffles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from internlm.cli import main
from internlm.data.megatron_files.reader import MegatronFile, index_path
from internlm.data.megatron_files.writer import MegatronWriter
from internlm.data.token_arrays.reader import TokenArray
from internlm.data.tokenized_files.reader import TokenizedFile
from internlm.data.tokenized_files.tokenizer_record import TokenizerRecord, read_record, write_record
from internlm.data.tokenized_files.writer import TokenizedWriter, meta_path
from internlm.data.tools.input_documents import open_inputs

DOCUMENTS = [[5, 6, 7, 2], [], [2], [*range(3, 90), 2], [9, 2], [8, 7, 2]]
MASKED = [[-5, 6, 7], [0, -3, 4]]


def tokenized(path: Path, documents: list[list[int]] = DOCUMENTS) -> Path:
    with TokenizedWriter(path) as writer:
        for document in documents:
            writer.write(document, [0] if document[:1] == [0] else ())
    return path


def documents_of(*paths: Path, **options: object) -> list[list[int]]:
    """The documents of files of one format; tokens without loss are negative."""
    inputs = open_inputs(paths, **options)  # type: ignore[arg-type]
    return [np.where(each.loss_mask, each.ids, -each.ids).tolist() for each in inputs.documents()]


def data(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    """What the command prints."""
    assert main(["data", *map(str, arguments)]) == code
    printed = capsys.readouterr()
    return printed.err if code == 2 else printed.out


# -- convert ------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "format", "options"),
    [
        ("b.bin", "tokenized", ()),
        ("b.bin", "megatron", ()),
        ("b.bin", "megatron", ("--dtype", "int64")),
        ("b.ds", "arrays", ()),
        ("b.parquet", "parquet", ()),
    ],
)
def test_documents_survive_a_conversion_there_and_back(
    name: str, format: str, options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tokenized(tmp_path / "a.bin")
    middle, back = tmp_path / "middle" / name, tmp_path / "back.bin"
    printed = data(capsys, "convert", source, "--to", format, "--output", middle, *options)
    assert f"{middle}: 6 documents, 98 tokens" in printed
    data(capsys, "convert", middle, "--to", "tokenized", "--output", back)
    assert documents_of(back) == DOCUMENTS
    assert back.read_bytes() == source.read_bytes() and meta_path(back).read_bytes() == meta_path(source).read_bytes()


def test_options_and_places_that_cannot_be_meant_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tokenized(tmp_path / "a.bin")
    for target in (("tokenized", "b.bin"), ("arrays", "b.ds")):
        options = ("--to", target[0], "--output", tmp_path / target[1], "--separator", 2)
        assert "for arrays that are read, give --array-separator" in data(capsys, "convert", source, *options, code=2)
    for arguments in (
        ("convert", source, "--to", "megatron", "--output", "s3://bucket/b.bin"),
        ("inspect", "s3://bucket/a.bin"),
        ("tokenize", "a.txt", "--tokenizer", "t", "--output", "s3://bucket/b.bin"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["data", *map(str, arguments)])
        assert stopped.value.code == 2 and "is a URL, and a path on a local disk is expected" in capsys.readouterr().err
    assert not Path("s3:").exists()


@pytest.mark.parametrize("suffix", [".npy", ".bin"])
def test_arrays_with_a_separator(suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = tokenized(tmp_path / "a.bin"), tmp_path / f"b{suffix}"
    message = data(capsys, "convert", source, "--to", "arrays", "--output", output, code=2)
    assert "has no room for document ends" in message and "--separator" in message and not output.exists()
    options = ("--separator", 2, "--dtype", "uint16")
    printed = data(capsys, "convert", source, "--to", "arrays", "--output", output, *options)
    assert "type='arrays'" in printed and "array_separator=2" in printed
    file = TokenArray(output, dtype="uint16", separator=2)
    assert [file.read(number)[0].tolist() for number in range(len(file))] == [each or [2] for each in DOCUMENTS]
    message = data(
        capsys, "convert", source, "--to", "arrays", "--output", tmp_path / "c.npy", "--separator", 5, code=2
    )
    assert "document 0 has the separator 5 inside" in message
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == ["a.bin", "a.bin.meta", output.name]


def test_masked_tokens_are_kept_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tokenized(tmp_path / "a.bin", MASKED)
    message = data(capsys, "convert", source, "--to", "megatron", "--output", tmp_path / "b.bin", code=2)
    assert "document 0 has tokens without loss" in message and "--drop-mask" in message
    assert not list(tmp_path.glob("*b.*"))
    data(capsys, "convert", source, "--to", "megatron", "--output", tmp_path / "b.bin", "--drop-mask")
    assert documents_of(tmp_path / "b.bin") == [[5, 6, 7], [0, 3, 4]]
    data(capsys, "convert", source, "--to", "parquet", "--output", tmp_path / "c.parquet")
    data(capsys, "convert", tmp_path / "c.parquet", "--to", "tokenized", "--output", tmp_path / "d.bin")
    assert (tmp_path / "d.bin").read_bytes() == source.read_bytes()
    assert not TokenizedFile(tmp_path / "d.bin").read(1)[1][0]  # the masked 0


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, other = tokenized(tmp_path / "a.bin"), tokenized(tmp_path / "b.bin", [[1]])
    before = other.read_bytes()
    for action in ("merge", "shuffle"):
        assert "b.bin: exists already" in data(capsys, action, source, "--output", other, code=2)
    assert "exists already" in data(capsys, "convert", source, "--to", "megatron", "--output", other, code=2)
    assert other.read_bytes() == before
    message = data(capsys, "convert", source, "--to", "megatron", "--output", tmp_path / "c.npy", code=2)
    assert "files of 'megatron' are named *.bin" in message


# -- merge, split, shuffle ------------------------------------------------------------


def test_merge_is_that_of_megatron(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sequences = [[2, 1], [0], [1, 3]]
    for name in ("a", "b"):
        with MegatronWriter(tmp_path / "parts" / f"{name}.bin", np.dtype(np.uint16)) as writer:
            for lengths in sequences:
                writer.write(list(range(sum(lengths))), lengths)
    data(capsys, "merge", tmp_path / "parts", "--output", tmp_path / "all.bin")
    merged, part = MegatronFile(tmp_path / "all.bin"), tmp_path / "parts" / "a.bin"
    assert merged.path.read_bytes() == part.read_bytes() * 2 and merged.dtype == np.uint16
    assert [merged.sequence_lengths(number).tolist() for number in range(6)] == sequences * 2
    data(capsys, "merge", part, "--output", tmp_path / "copy.bin")
    assert index_path(tmp_path / "copy.bin").read_bytes() == index_path(part).read_bytes()


def test_split_and_merge_are_inverse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    documents = [[1] * (number % 7 + 1) for number in range(100)]
    source = tokenized(tmp_path / "a.bin", documents)
    data(capsys, "split", source, "--parts", 3, "--output", tmp_path / "out" / "x.bin")
    parts = sorted((tmp_path / "out").glob("*.bin"))
    assert [path.name for path in parts] == [f"x-0000{part}-of-00003.bin" for part in range(3)]
    sizes = [sum(map(len, documents_of(path))) for path in parts]
    assert max(sizes) - min(sizes) <= 14
    data(capsys, "merge", *parts, "--output", tmp_path / "b.bin")
    assert (tmp_path / "b.bin").read_bytes() == source.read_bytes()
    few = tokenized(tmp_path / "few.bin", [[1] * 50, [1], [1]])
    data(capsys, "split", few, "--parts", 3, "--output", tmp_path / "y.bin")
    assert [len(documents_of(path)) for path in sorted(tmp_path.glob("y-*.bin"))] == [1, 1, 1]
    assert "cannot be split into 4 files" in data(capsys, "split", few, "--parts", 4, "--output", few, code=2)


def test_documents_of_one_length_are_split_evenly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tokenized(tmp_path / "a.bin", [[number] * 5 for number in range(1, 9)])
    data(capsys, "split", source, "--parts", 4, "--output", tmp_path / "x.bin")
    assert [len(documents_of(path)) for path in sorted(tmp_path.glob("x-*.bin"))] == [2] * 4


def test_every_part_has_a_document_if_the_last_one_is_long(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tokenized(tmp_path / "a.bin", [[1], [2], [3], [4] * 50])
    data(capsys, "split", source, "--parts", 3, "--output", tmp_path / "x.bin")
    assert [documents_of(path) for path in sorted(tmp_path.glob("x-*.bin"))] == [[[1], [2]], [[3]], [[4] * 50]]


def test_shuffle_is_a_permutation_of_the_seed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = tokenized(tmp_path / "a.bin", [[number] for number in range(60)])
    second = tokenized(tmp_path / "b.bin", [[number] for number in range(60, 100)])
    for name, seed in ("c", 1), ("d", 1), ("e", 2):
        data(capsys, "shuffle", first, second, "--seed", seed, "--output", tmp_path / f"{name}.bin")
    shuffled = documents_of(tmp_path / "c.bin")
    assert sorted(shuffled) == [[number] for number in range(100)] != shuffled
    assert (tmp_path / "c.bin").read_bytes() == (tmp_path / "d.bin").read_bytes() != (tmp_path / "e.bin").read_bytes()


def test_the_tokenizer_is_remembered(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tokenized(tmp_path / "a.bin")
    record = TokenizerRecord("print", "/t", 100, 1, 2, False, True)
    write_record(source, record)
    data(capsys, "convert", source, "--to", "arrays", "--output", tmp_path / "b.npy")  # eos separates
    found = read_record(tmp_path / "b.npy")
    assert found is not None and found.fingerprint == "print"
    assert np.load(tmp_path / "b.npy").dtype == np.uint16
    other = tokenized(tmp_path / "c.bin")
    write_record(other, TokenizerRecord("other", "/u", 100, 1, 2, False, True))
    message = data(capsys, "merge", source, other, "--output", tmp_path / "d.bin", code=2)
    assert "different tokenizers" in message


# -- verify ------------------------------------------------------------


def test_verify_names_everything_that_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tokenized(tmp_path / "a.bin")
    printed = data(capsys, "verify", path)
    assert f"{path}: good, 6 documents, 98 tokens, largest id 89, 1 empty documents" in printed
    assert "--vocab-size" in printed
    printed = data(capsys, "verify", path, "--vocab-size", 9, code=1)
    assert "DAMAGED, 2 problem(s); readable: 4 documents" in printed
    assert "document 3 at byte" in printed and "document 4 at byte" in printed
    text = path.read_bytes()
    path.write_bytes(text.replace(b'{"tokens": [9,2]}', b'{"tokens": [9,"}'.ljust(17)))
    printed = data(capsys, "verify", path, code=1)
    assert "1 problem(s)" in printed and "document 4 at byte" in printed and "is not JSON" in printed


@pytest.mark.parametrize("format", ["megatron", "arrays", "parquet"])
def test_verify_reads_every_format(format: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = {"megatron": "b.bin", "arrays": "b.ds", "parquet": "b.parquet"}[format]
    path = tmp_path / "x" / name
    data(capsys, "convert", tokenized(tmp_path / "a.bin"), "--to", format, "--output", path, "--vocab-size", 100)
    raw = ("--array-dtype", "uint16") if format == "arrays" else ()
    assert "good, 6 documents, 98 tokens" in data(capsys, "verify", path, *raw, "--vocab-size", 90)
    printed = data(capsys, "verify", path, *raw, "--vocab-size", 89, code=1)
    assert "1 problem(s)" in printed and "outside the vocabulary" in printed and str(path) in printed
    path.write_bytes(path.read_bytes()[:-2])
    printed = data(capsys, "verify", path, *raw, code=1)
    assert "DAMAGED" in printed and str(path) in printed


def test_verify_shows_the_first_problems_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tokenized(tmp_path / "a.bin", [[7]] * 50)
    printed = data(capsys, "verify", path, "--vocab-size", 7, "--limit", 3, code=1)
    assert printed.count("document ") == 3 and "and 47 more" in printed and "50 problem(s)" in printed


# -- inspect ------------------------------------------------------------


def test_inspect_counts_by_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("cn", "en"):
        tokenized(tmp_path / "train" / name / "a.bin")
    printed = data(capsys, "inspect", tmp_path / "train", "--png", tmp_path / "lengths.png")
    rows = {line.split()[0]: line.split() for line in printed.splitlines() if line.strip()}
    assert rows["cn"] == ["cn", "1", "6", "98", "50.0%", "16.3", "88"] and rows["all"][2:4] == ["12", "196"]
    assert rows["64-127"][1:3] == ["2", "176"] and rows["0"][1:3] == ["2", "0"]
    assert (tmp_path / "lengths.png").read_bytes().startswith(b"\x89PNG")


def test_inspect_shows_a_sample_of_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenized(tmp_path / "train" / "a.bin", [[-11, -12, 13, 14]] * 8)
    config = tmp_path / "config.py"
    config.write_text(
        f"data = dict(seq_len=8, micro_bsz=1, micro_num=4, total_steps=2, train_folder='{tmp_path / 'train'}')\n"
        "model = dict(vocab_size=20, hidden_size=8, num_layers=1, num_attention_heads=1, dtype='torch.float32')\n"
        "ckpt = dict(enable_save_ckpt=False)\n"
    )
    printed = data(capsys, "inspect", "--config", config, "--sample", 5)
    assert "sample 5: epoch 2 of 4 samples each; type train" in printed
    assert printed.count("⟦11 12 ⟧13 14") == 2 and "segment 1: 4 tokens, 2 labels" in printed
    assert "together" in data(capsys, "inspect", "--config", config, code=2)


# -- what is asked wrongly ------------------------------------------------------------


def test_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such file or folder" in data(capsys, "inspect", tmp_path / "none", code=2)
    assert "no file of documents" in data(capsys, "inspect", tmp_path, code=2)
    assert "name at least one file" in data(capsys, "verify", code=2)
    source = tokenized(tmp_path / "a.bin")
    np.save(tmp_path / "b.npy", np.arange(4))
    assert "several formats" in data(capsys, "inspect", tmp_path, code=2)
    assert "give the format of the output" in data(capsys, "convert", source, "--output", tmp_path / "c.bin", code=2)
    (tmp_path / "raw.bin").write_bytes(b"\x01\x00\x02\x00")
    assert "data.array_dtype" in data(capsys, "inspect", tmp_path / "raw.bin", code=2)


def test_a_file_of_another_kind_is_told_with_what_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = tokenized(tmp_path / "tok" / "a.bin")
    meta_path(lines).unlink()
    with MegatronWriter(tmp_path / "meg" / "m.bin", np.dtype(np.uint16)) as writer:
        writer.write([1, 2, 3])
    (tmp_path / "meg" / "alone.bin").write_bytes(b"\x01\x00" * 8)
    (tmp_path / "txt").mkdir()
    (tmp_path / "txt" / "a.jsonl").write_text('{"text": "hello"}')
    (tmp_path / "empty").mkdir()
    for action in ("inspect", "convert"):
        more = ("--to", "arrays", "--separator", 9, "--output", tmp_path / "o.npy") if action == "convert" else ()
        for name, expected in {
            "tok": f"a.bin.meta is missing; if the .bin is correct, rebuild the .meta: python tools/tokenizer.py "
            f"--rebuild-meta {lines}",
            "tok/a.bin": "rebuild the .meta",
            "meg/m.idx": f"the index of a Megatron dataset, not a file of documents (.bin, .npy, .ds, .parquet); name "
            f"{tmp_path}/meg/m.bin",
            "meg/alone.bin": "raw integers without a header; set data.array_dtype (`internlm data`: --array-dtype)",
            "meg": "meg/alone.bin: raw integers without a header",
            "txt": f"It has a.jsonl, text or rows: train on them with data.type = 'streaming', or tokenize them: "
            f"internlm data tokenize {tmp_path}/txt --tokenizer TOKENIZER --output NAME.bin",
            "txt/a.jsonl": "a.jsonl: text or rows, not a file of documents",
            "empty": "no file of documents (.bin, .npy, .ds, .parquet). It is empty",
        }.items():
            assert expected in data(capsys, action, tmp_path / name, *more, code=2), name
    assert f"{lines.name}: a tokenized file without its a.bin.meta" in data(
        capsys, "verify", lines, "--from", "arrays", code=1
    )
    printed = data(capsys, "verify", lines, "--from", "megatron", code=1)
    assert "a.idx: no such file" in printed and "It is a tokenized file without its a.bin.meta: rebuild" in printed
    printed = data(capsys, "verify", tmp_path / "meg" / "m.bin", "--from", "tokenized", code=1)
    assert "m.bin: a Megatron dataset, not a tokenized file (NAME.bin with NAME.bin.meta); set data.type =" in printed
    assert data(capsys, "inspect", tmp_path / "meg" / "m")


def test_a_folder_in_place_of_a_file_and_a_file_in_place_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tokenized(tmp_path / "a.bin")
    (tmp_path / "d").mkdir()
    for arguments in (("merge", source), ("split", source, "--parts", 2), ("shuffle", source)):
        assert f"such as {tmp_path}/d/NAME.bin" in data(capsys, *arguments, "--output", tmp_path / "d", code=2)
        assert "a.bin is a file; name one" in data(capsys, *arguments, "--output", source / "b.bin", code=2)
    assert f"such as {tmp_path}/d/NAME.png" in data(capsys, "inspect", source, "--png", tmp_path / "d", code=2)
    (tmp_path / "a.txt").write_text("the text of the test\n" * 9)
    options = ("tokenize", tmp_path / "a.txt", "--tokenizer", tmp_path / "d", "--output", tmp_path / "o.bin")
    assert "d: no tokenizer in this folder" in data(capsys, *options, code=2)
    options = ("tokenize", tmp_path / "a.txt", "--train", 265, "--tokenizer", tmp_path / "t" / "tokenizer.json")
    assert main(["data", *map(str, options)]) == 0
    options = ("tokenize", tmp_path / "a.txt", "--tokenizer", tmp_path / "t", "--output", tmp_path / "d")
    assert f"such as {tmp_path}/d/NAME.bin" in data(capsys, *options, code=2)
    options = ("tokenize", source, "--tokenizer", tmp_path / "t", "--output", tmp_path / "o.bin")
    assert f"no text, but token ids; `internlm data inspect {source}` shows them" in data(capsys, *options, code=2)
