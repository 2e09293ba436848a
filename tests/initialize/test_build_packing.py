"""Packing and fill-in-the-middle of a config, through `build_trainer`."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.commands import write_config
from torch.nn import functional as F

from internlm.config.loader import load_config
from internlm.core.context.parallel_context import ParallelContext
from internlm.core.trainer import Trainer
from internlm.data.batch import IGNORE_INDEX, MicroBatch
from internlm.data.tokenized_files.writer import TokenizedWriter
from internlm.initialize.build import build_layout, build_trainer
from internlm.initialize.build_data import fill_in_the_middle
from internlm.utils.errors import ConfigError

PRE, MID, SUF, EOS = 57, 58, 59, 60


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    with TokenizedWriter(tmp_path / "train" / "en" / "a.bin") as writer:
        for length in random.integers(1, 25, 60).tolist():
            writer.write([*random.integers(1, PRE, length).tolist(), EOS])
    return tmp_path


def new(folder: Path, *overrides: str) -> Trainer:
    path = write_config(folder / "run")
    values = ["data.total_steps=20", "ckpt.enable_save_ckpt=False", f"data.train_folder='{folder / 'train'}'"]
    config = load_config(path, [*values, *overrides]).config
    return build_trainer(config, ParallelContext.create(build_layout(config, 1)), folder / "run")


def micro_batches(trainer: Trainer) -> list[MicroBatch]:
    batches = [next(iter(trainer.train_loader)) for _ in range(4)]
    return [micro for batch in batches for micro in batch.micro_batches]


def loss_of(trainer: Trainer, micro: MicroBatch) -> float:
    """The mean loss of one micro-batch, by a step with learning rate 0."""
    batch = next(iter(trainer.train_loader))
    batch.micro_batches = [micro]
    return float(trainer.engine.train_step(batch, 0.0).loss)


def sum_of_losses(trainer: Trainer, micro: MicroBatch, borders: list[int]) -> float:
    """The loss of the parts of a micro-batch between `borders`, each computed alone."""
    total, model = 0.0, trainer.engine.model
    for first, last in pairwise(borders):
        hidden = model(micro.input_ids[:, first:last], torch.arange(last - first)[None])
        logits = model.logits(hidden)[0]  # type: ignore[operator]
        labels = micro.labels[0, first:last]
        total += F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX).item()
    return total


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("packing", ["cut", "best_fit"])
def test_attention_stays_within_documents_if_there_is_a_mask(folder: Path, packing: str, mask: bool) -> None:
    """The loss of a packed micro-batch is that of its documents alone; without a mask, that of its rows."""
    trainer = new(folder, f"data.packing='{packing}'", f"data.document_mask={mask}")
    differs = False
    for micro in micro_batches(trainer)[:3]:
        assert micro.lengths is not None
        length = micro.input_ids.shape[1]
        ends_of_documents = {int(at) + 1 for at in np.flatnonzero(micro.input_ids[0].numpy() == EOS)}
        borders = [0, *np.cumsum(micro.lengths).tolist()]
        total = sum_of_losses(trainer, micro, borders)
        assert loss_of(trainer, micro) == pytest.approx(total / micro.num_valid_tokens, rel=1e-5)
        if mask:
            # Segments are documents, or parts of them.
            assert ends_of_documents <= set(borders)
        else:
            assert micro.lengths == (16, 16)
            alone = sum_of_losses(trainer, micro, sorted({*borders, *ends_of_documents, length}))
            differs |= abs(alone - total) > 1e-3
    assert mask or differs


def test_fill_in_the_middle_reaches_the_batches(folder: Path) -> None:
    tokens = f"prefix={PRE}, middle={MID}, suffix={SUF}, bos=None, eos={EOS}"
    trainer = new(folder, "data.packing='best_fit'", f"data.fim=dict(rate=1.0, {tokens})")
    micros = micro_batches(trainer)
    assert sum(int((micro.input_ids == PRE).sum()) for micro in micros) > 10
    assert sum(int((micro.labels == MID).sum()) for micro in micros) > 10


class _Tokenizer:
    bos_id, eos_id = None, 2

    def pieces(self) -> list[str]:
        return ["", "a", "<end>", "<pre>", "<mid>", "<suf>"]


def test_tokens_are_found_in_the_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("internlm.initialize.build_data.load_tokenizer", lambda path: _Tokenizer())

    def of(**changes: Any) -> Any:
        fim = {"rate": 0.5, "prefix": "<pre>", "middle": "<mid>", "suffix": "<suf>", **changes}
        overrides = [f"data.fim={fim!r}", "data.train_folder='x'", "data.tokenizer_path='y'"]
        return fill_in_the_middle(load_config(write_config(folder / "tokens"), overrides).config)

    found = of()
    assert (found.prefix, found.middle, found.suffix, found.bos, found.eos) == (3, 4, 5, None, 2)
    assert (of(bos="a", eos=None).bos, of(bos="a", eos=None).eos) == (1, None)
    with pytest.raises(ConfigError, match=r"data.fim.prefix = '<prf>' is not a token of y.*Did you mean '<pre>'"):
        of(prefix="<prf>")
    with pytest.raises(ConfigError, match=r"have the ids \[3, 4, 4\]"):
        of(suffix=4)
