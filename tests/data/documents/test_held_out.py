"""Documents held out of training: which they are, and that no training sample has one, in any packing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from internlm.data.documents.held_out import held_out_documents, num_held_out
from internlm.data.documents.valid_sets import folder_sets, held_out_sets, named_set
from internlm.data.loaders.valid_loader import build_valid_loaders
from internlm.data.megatron_files.file_format import MEGATRON
from internlm.data.megatron_files.writer import MegatronWriter
from internlm.data.sources.document_source import DocumentSource
from internlm.data.token_arrays.file_format import ArrayFormat
from internlm.data.token_arrays.writer import ArrayWriter
from internlm.data.tokenized_files.file_format import TOKENIZED
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.utils.errors import DataError

FORMATS = {"tokenized": TOKENIZED, "megatron": MEGATRON, "arrays": ArrayFormat("uint16")}
PACKINGS = [
    ("cut", None), ("cut", False), ("pack_sample_into_one", None), ("unpacked", None), ("best_fit", None),
    ("best_fit", False),
]  # fmt: skip
VOCAB = 1000


def write(path: Path, documents: list[list[int]], format: str = "tokenized") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    writers: dict[str, Any] = {
        "tokenized": lambda: TokenizedWriter(path.with_suffix(".bin")),
        "megatron": lambda: MegatronWriter(path.with_suffix(".bin"), np.dtype(np.uint16)),
        "arrays": lambda: ArrayWriter(path.with_suffix(".ds"), np.dtype(np.uint16)),
    }
    with writers[format]() as writer:
        for document in documents:
            writer.write(np.array(document))


def corpus(folder: Path, format: str = "tokenized") -> dict[str, list[list[int]]]:
    """Two types; every document has an id of its own in all its places, so that ids tell the documents."""
    random = np.random.default_rng(0)
    ids = iter(range(1, VOCAB))
    documents: dict[str, list[list[int]]] = {"cn": [], "en": []}
    for type_name, files in (("cn", (40,)), ("en", (90, 70, 1))):
        for number, count in enumerate(files):
            here = [[next(ids)] * int(random.integers(2, 40)) for _ in range(count)]
            write(folder / type_name / f"{number}", here, format)
            documents[type_name] += here
    return documents


def ids_of_training(source: DocumentSource) -> set[int]:
    return {int(id) for index in range(len(source)) for id in np.unique(source.sample(index).input_ids)} - {0}


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(("packing", "document_mask"), PACKINGS)
def test_held_out_documents_are_in_no_sample(
    tmp_path: Path, format: str, packing: Any, document_mask: bool | None
) -> None:
    documents = corpus(tmp_path, format)
    options: dict[str, Any] = {"seq_len": 16, "micro_bsz": 2, "packing": packing, "document_mask": document_mask}
    options |= {"vocab_size": VOCAB, "min_length": 4}
    sets = held_out_sets(tmp_path, FORMATS[format], 0.2, 4, None)
    assert [each.name for each in sets] == ["held_out/cn", "held_out/en"]
    held_out = {}
    for each, type_name in zip(sets, ("cn", "en"), strict=True):
        loaded = build_valid_loaders([each], seq_len=16, micro_bsz=2, vocab_size=VOCAB)[each.name]
        labels = np.concatenate([micro.labels.numpy()[0] for batch in loaded for micro in batch.micro_batches])
        found = {int(id) for id in np.unique(labels)} - {-100}
        expected = {document[0]: len(document) - 1 for document in documents[type_name]}
        assert found <= expected.keys()
        # Every label of each, once.
        assert all((labels == id).sum() == expected[id] >= 3 for id in found)
        held_out[type_name] = found
    everything = {document[0] for group in documents.values() for document in group if len(document) >= 4}
    whole = DocumentSource(tmp_path, FORMATS[format], **options)
    trained = ids_of_training(DocumentSource(tmp_path, FORMATS[format], **options, valid_fraction=0.2))
    excluded = held_out["cn"] | held_out["en"]
    assert 0.14 < len(excluded) / 201 < 0.24
    assert not trained & excluded and trained | excluded <= everything
    assert excluded & ids_of_training(whole)
    if packing in ("unpacked", "best_fit"):  # the others drop an incomplete last sample
        assert trained | excluded == everything


def test_a_smaller_fraction_holds_out_a_part() -> None:
    path, folder = Path("/data/train/en/a.bin"), "/data/train"
    counts = [num_held_out(1000, fraction, path, folder) for fraction in (0.0, 0.001, 0.01, 0.0105, 0.5)]
    assert counts[0] == 0 and counts == sorted(counts) and abs(counts[2] - 10) <= 1 and abs(counts[4] - 500) <= 1
    chosen = [set(held_out_documents(1000, count).tolist()) for count in counts]
    assert all(smaller <= larger for smaller, larger in itertools.pairwise(chosen))
    assert [len(each) for each in chosen] == counts


def test_many_small_files_have_the_fraction_together() -> None:
    total = sum(num_held_out(7, 0.01, Path(f"/d/en/{number}.bin"), "/d") for number in range(2000))
    assert 100 < total < 180
    assert num_held_out(7, 0.01, Path("/d/en/1.bin"), "/d") == num_held_out(7, 0.01, Path("/e/en/1.bin"), "/e")


def test_the_number_of_held_out_documents_is_part_of_the_cached_index(tmp_path: Path) -> None:
    corpus(tmp_path)
    options: dict[str, Any] = {"seq_len": 16, "micro_bsz": 2, "packing": "best_fit", "vocab_size": VOCAB}
    fractions = (0.0, 0.3, 0.6, 0.3, 0.0)
    sizes = [DocumentSource(tmp_path, TOKENIZED, **options, valid_fraction=each).num_tokens for each in fractions]
    assert sizes[0] > sizes[1] > sizes[2] and sizes[:2] == sizes[4:2:-1]
    source = DocumentSource(tmp_path, TOKENIZED, **options, valid_fraction=0.3)
    total = sum(int((source.sample(index).input_ids > 0).sum()) for index in range(len(source)))
    assert total == sizes[1]
    assert source.facts["valid_fraction"] == 0.3


def test_what_holds_out_nothing_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2, 3]] * 4)
    (alone,) = held_out_sets(tmp_path, TOKENIZED, 1e-9, 0, None)
    assert alone.name == "held_out"
    with pytest.raises(DataError, match=r"data\.valid_fraction = 1e-09 holds out no document"):
        alone.open(10)
    with pytest.raises(DataError, match=r"none has enough for one sample"):
        DocumentSource(tmp_path, TOKENIZED, seq_len=2, micro_bsz=1, packing="cut", valid_fraction=0.9999)


def test_messages_name_the_document_in_the_whole_file(tmp_path: Path) -> None:
    write(tmp_path / "a", [[number + 1] * 3 for number in range(50)])
    (alone,) = held_out_sets(tmp_path, TOKENIZED, 0.1, 0, None)
    (selection,) = alone.open(5)
    document = int(held_out_documents(50, len(selection))[0])
    with pytest.raises(DataError, match=rf"a\.bin: document {document} .*token {document + 1} at position 0"):
        selection.read(0)


def test_a_named_set_has_all_files_of_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "a" / "x", [[1, 2, 3]] * 4)
    write(tmp_path / "b" / "y", [[1, 2, 3]] * 3)
    assert [each.name for each in folder_sets(tmp_path, TOKENIZED)] == ["a", "b"]
    named = named_set("both", tmp_path, TOKENIZED)
    assert named.name == "both" and sum(len(file) for file in named.open(None)) == 7
