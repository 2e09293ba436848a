"""The sources of a config: formats, seeds and tokenizers of each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.configs import small_config

from internlm.config.schema import Config
from internlm.core.context.layout import ParallelLayout
from internlm.core.context.parallel_context import ParallelContext
from internlm.data.tokenize.pipeline import TokenizeOptions, tokenize
from internlm.data.tokenize.train_bpe import train_bpe
from internlm.initialize.build_data import build_loader
from internlm.initialize.data_checks import check_data
from internlm.initialize.tokenizers import data_tokenizer
from internlm.initialize.train_sources import train_sources
from internlm.utils.errors import ConfigError, DataError

TEXTS = ["the model reads the text and the code", "def add(first, second):\n    return first + second"] * 20


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files by the tokenizers a and b, of the same size and with other ids."""
    folder = tmp_path_factory.mktemp("places")
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    for name, texts in (("a", TEXTS), ("b", [text[::-1] for text in TEXTS])):
        train_bpe(texts, 280, folder / name / "tokenizer.json")
        for kind in ("web", "code"):
            output = folder / f"data_{name}" / kind / "x.bin"
            tokenize(TokenizeOptions((str(folder / "text.jsonl"),), output, folder / name, processes=1))
    return folder


def config_of(*entries: dict[str, Any], **data: Any) -> Config:
    blend = [{"weight": 1, **entry} for entry in entries]
    return small_config(
        {"data.blend": blend, "model.vocab_size": 280, **{f"data.{name}": value for name, value in data.items()}}
    )


def test_each_source_has_its_own_seed_and_place(places: Path) -> None:
    web, code = str(places / "data_a" / "web"), str(places / "data_a" / "code")
    config = config_of({"path": web}, {"blend": [{"path": code, "weight": 2, "min_length": 3}]}, seed=7)
    first, second = train_sources(config)
    assert (first.key, second.key) == ("data.blend[0].path", "data.blend[1].blend[0].path")
    assert (first.config.data.train_folder, second.config.data.train_folder) == (web, code)
    assert second.config.data.min_length == 3 and first.config.data.min_length == 0
    assert len({7, first.config.data.seed, second.config.data.seed}) == 3
    alone = config_of({"path": code}, seed=7)
    assert train_sources(alone)[0].config.data.seed == second.config.data.seed
    assert [source.key for source in train_sources(small_config({}))] == ["data.train_folder"]
    context = ParallelContext(ParallelLayout(), 0, torch.device("cpu"))
    lines = check_data(config, context)
    assert [f"'{path}'" in line for path, line in zip((web, code), lines, strict=True)] == [True, True]
    loader = build_loader(config, context)
    assert loader.type_names == ["code", "web"] and loader.progress_at(0)["source/web/epochs"] == 0
    loader.close()


def test_tokenizers_of_all_sources_are_compared(places: Path) -> None:
    a, b = ({"path": str(places / f"data_{name}" / "web"), "name": name} for name in "ab")
    known = data_tokenizer(config_of(a, {**a, "name": "again"}))
    assert known is not None and str(places / "a") in known.where
    with pytest.raises(DataError, match="made by different tokenizers"):
        data_tokenizer(config_of(a, {"blend": [{**b, "weight": 1}]}))
    with pytest.raises(ConfigError, match=r"the tokenizer of data\.tokenizer_path differs from that of the data"):
        data_tokenizer(config_of(a, tokenizer_path=str(places / "b")))
    # Rows are tokenized by data.tokenizer_path.
    rows = {"path": str(places / "text.jsonl"), "type": "streaming", "name": "rows"}
    with pytest.raises(ConfigError, match=r"the tokenizer of data\.tokenizer_path differs from that of the data"):
        data_tokenizer(config_of(a, rows, tokenizer_path=str(places / "b")))
    assert data_tokenizer(config_of(a, rows, tokenizer_path=str(places / "a"))) is not None


def test_fill_in_the_middle_applies_to_each_source(places: Path) -> None:
    path = str(places / "data_a" / "web")
    fim = {"rate": 1.0, "prefix": 277, "middle": 278, "suffix": 279, "bos": None, "eos": None}
    config = config_of({"path": path}, {"path": path, "name": "other"}, fim=fim)
    loader = build_loader(config, ParallelContext(ParallelLayout(), 0, torch.device("cpu")))
    micros = [micro for _ in range(3) for micro in next(loader).micro_batches]
    loader.close()
    assert all((micro.input_ids == 277).any() for micro in micros)
